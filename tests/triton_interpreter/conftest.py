"""Triton's interpreter for the tests of this directory, and a printed reason where they cannot run.

Triton decides when it is first imported whether kernels are interpreted, for the whole process. So these tests run in
a process of their own: ``make test`` starts one, and ``pytest tests/triton_interpreter`` does. A run of everything in
one process (plain ``pytest``) reports them as skipped.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    own = all(HERE in (Path(argument.split("::")[0]).resolve() / "x").parents for argument in config.args)
    if own and "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
    if why_not() is None:
        index_one_element_arrays()


def index_one_element_arrays() -> None:
    """Let Triton before 3.7.1 use a tensor as an index: it asks numpy, from 2.4 on in vain, for int() of its array."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, *scope):
        patch(tensor, *scope)
        index = lambda self: int(self.handle.data.squeeze())  # noqa: E731
        if scope:
            scope[0].set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index

    interpreter._patch_lang_tensor = patched


def why_not() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "the interpreter needs a process of its own: pytest tests/triton_interpreter"
    return None


class Unavailable(pytest.Module):
    """A test module that is not imported, and says why."""

    def collect(self):
        pytest.skip(why_not(), allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return Unavailable.from_parent(parent, path=module_path) if why_not() else None


@pytest.fixture(autouse=True)
def triton_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPT_BACKEND", "triton")
