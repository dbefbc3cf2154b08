"""Makes ``pyramid_testing`` importable by the kernel and layer tests, whatever directory pytest starts from."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
