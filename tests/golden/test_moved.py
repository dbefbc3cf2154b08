"""Old import paths: they lead to what moved, and say where it is."""

from __future__ import annotations

import importlib
import pickle
import sys

import pytest

import ept
import ept._moved
import ept_kernels._moved
from ept_kernels._moved import MovedModules

MOVED = {**ept._moved.MOVED, **ept_kernels._moved.MOVED}


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> str:
    """The path of a module that moved to two others."""
    old = "ept.once_was_here"
    finder = MovedModules({old: ("ept_kernels.geometry", "ept.config")})
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, finder])
    yield old
    sys.modules.pop(old, None)
    vars(ept).pop("once_was_here", None)


def test_an_old_path_leads_to_the_new_names_and_warns(moved: str) -> None:
    with pytest.warns(DeprecationWarning, match=r"ept.once_was_here has moved to ept_kernels.geometry and ept.config"):
        module = importlib.import_module(moved)
    assert module.EPTConfig is ept.EPTConfig
    assert module.PyramidGeometry.__name__ == "PyramidGeometry"
    with pytest.raises(AttributeError, match=r"'ept.once_was_here' has no attribute 'nothing'"):
        _ = module.nothing


def test_what_was_pickled_under_an_old_path_is_read(moved: str) -> None:
    with pytest.warns(DeprecationWarning, match=moved):
        assert pickle.loads(f"c{moved}\nEPTConfig\n.".encode()) is ept.EPTConfig


@pytest.mark.parametrize("old", MOVED)
def test_every_line_of_the_tables_is_needed_and_right(old: str) -> None:
    if old.startswith("ept_kernels.triton") and importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton, which is not installed")
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} has moved"):
        module = importlib.import_module(old)
    assert isinstance(module.__spec__.loader, MovedModules), "there is a module at the old path"
    for new in MOVED[old]:
        importlib.import_module(new)
        assert new not in MOVED
