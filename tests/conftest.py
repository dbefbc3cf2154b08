"""Makes ``pyramid_testing`` importable by the kernel and layer tests, whatever directory pytest starts from."""

import sys
from pathlib import Path

import setuptools  # noqa: F401  (first: torch's inductor imports it too, which fails after the stdlib's distutils)

sys.path.insert(0, str(Path(__file__).parent))
