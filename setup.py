"""Pure Python today; native sources under ``csrc/`` will be built here when a toolchain is found, never demanded."""

from setuptools import setup

setup()
