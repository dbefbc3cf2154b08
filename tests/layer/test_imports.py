"""The rooms of ``ept``: each imports only from its own and those below it, and no two modules import each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import ept

ROOT = Path(ept.__file__).parent

#: From the ground up. A package stands for all of its modules.
ROOMS = (
    (
        "_moved",
        "version",
        "extras",
        "files",
        "models",
        "ranks",
        "mixture",
        "prototypes",
        "tasks",
        "rows",
        "provenance",
        "config",
        "saved",
    ),
    ("context", "recompute", "readers", "layer_adapter", "adapted_linear", "task_table"),
    ("pyramid", "baselines"),
    ("methods",),
    ("tuner",),
    ("introspection", "losses", "checking", "suggest", "plots", "data", "trainers", "export", "inspecting", "training"),
    ("train", "predict", "demo"),
)


def modules() -> dict[str, Path]:
    """Name relative to ``ept``, with the package's own for ``__init__``, of every module but the root."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path
    return found


MODULES = modules()


def imported(name: str) -> Iterator[str]:
    """What a module imports from ``ept``, wherever in its text; "" is the root."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first, _, rest = alias.name.partition(".")
                if first == "ept":
                    yield rest
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                parts = package.split(".") if package else []
                source = ".".join([*parts[: len(parts) - node.level + 1], *([source] if source else [])])
            elif source.partition(".")[0] != "ept":
                continue
            else:
                source = source.partition(".")[2]
            for alias in node.names:
                inner = f"{source}.{alias.name}".lstrip(".")
                yield inner if inner in MODULES else source


def room_of(name: str) -> int:
    found = [place for place, room in enumerate(ROOMS) if name.partition(".")[0] in room]
    assert found, f"ept.{name} has no room: name it in ROOMS"
    return found[0]


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_from_its_own_room_and_those_below(name: str) -> None:
    above = [other for other in imported(name) if other == "" or room_of(other) > room_of(name)]
    assert not above, f"ept.{name} imports {above}, which stand above it"


def test_no_modules_import_each_other() -> None:
    graph = {name: {other for other in imported(name) if other} - {name} for name in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")
