"""Makes the helpers of ``support/``, and folders such as ``cuda_on_cpu``, importable wherever pytest starts."""

import sys
from pathlib import Path

import setuptools  # noqa: F401  (first: torch's inductor imports it too, which fails after the stdlib's distutils)

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).with_name("support"))]
