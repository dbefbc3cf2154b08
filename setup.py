"""Builds the native kernels of ``csrc/`` where a toolchain is found; without one the package is pure Python."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).parent / "csrc"))  # pip does not put the source folder on the path
from build_native import BuildNative, extensions

setup(ext_modules=extensions(), cmdclass={"build_ext": BuildNative})
