"""Old import paths: they lead to what moved, and say where it is."""

from __future__ import annotations

import importlib
import importlib.util
import json
import pickle
import sys
from pathlib import Path

import pytest

import ept
import ept._moved
import ept_kernels._moved
from ept_kernels._moved import MovedModules

MOVED = {**ept._moved.MOVED, **ept_kernels._moved.MOVED}
PUBLIC = json.loads((Path(__file__).parent / "public_names.json").read_text())


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


def test_an_old_path_is_an_attribute_of_its_package_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ept.linear", raising=False)
    monkeypatch.delitem(vars(ept), "linear", raising=False)
    with pytest.warns(DeprecationWarning, match=r"ept.linear has moved to ept.pyramid.linear"):
        assert ept.linear.EPTLinear is ept.EPTLinear
    with pytest.raises(AttributeError, match=r"'ept' has no attribute 'nothing'"):
        _ = ept.nothing


def test_what_was_pickled_under_an_old_path_is_read(moved: str) -> None:
    with pytest.warns(DeprecationWarning, match=moved):
        assert pickle.loads(f"c{moved}\nEPTConfig\n.".encode()) is ept.EPTConfig


def moved_names(old: str) -> list[str]:
    """Names that the module had, has no longer, and finds elsewhere."""
    module = importlib.import_module(old)
    return [name for name in PUBLIC[old] if name not in vars(module) and hasattr(module, name)]


@pytest.mark.parametrize("old", MOVED)
def test_every_line_of_the_tables_is_needed_and_right(old: str) -> None:
    if old.startswith("ept_kernels.triton") and importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton, which is not installed")
    if isinstance(vars(sys.modules.get(old, ept)).get("__loader__"), MovedModules):
        del sys.modules[old]  # some other test has imported it, and got the warning
    with pytest.warns(DeprecationWarning, match=rf"{old}[.\w]* has moved to"):
        assert moved_names(old), "every name is still there"
    for new in MOVED[old]:
        assert not isinstance(importlib.import_module(new).__loader__, MovedModules), "moved twice: name the last place"
