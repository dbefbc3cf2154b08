"""Makes the scripts and modules of ``benchmarks/`` importable, as they are to each other."""

import sys
from pathlib import Path

for folder in ("benchmarks", "benchmarks/speed"):
    sys.path.insert(0, str(Path(__file__).parents[2] / folder))
