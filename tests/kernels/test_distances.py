"""How far it is from a layer to its kernels, and how long an argument list may be: measured, so that neither grows."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import ept_kernels
from ept import EPTConfig, EPTLinear
from ept_kernels.backends import cpu as cpu_backend

PACKAGE = Path(ept_kernels.__file__).parent
REPOSITORY = PACKAGE.parent
ROOMS = {PACKAGE, REPOSITORY / "ept"}
#: What users call, by its arguments' names; and what ``torch.library`` calls, by its schema.
PUBLIC = {f"{name}" for name in ept_kernels.__all__}


def functions() -> Iterator[tuple[str, ast.FunctionDef, int]]:
    """``(file: name, function, how many arguments it has)`` of every function of the package."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                count = len(arguments) - (arguments[:1] in (["self"], ["cls"]))
                yield f"{path.relative_to(PACKAGE)}: {node.name}", node, count


def is_kernel(node: ast.FunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def test_python_functions_have_fewer_than_eight_parameters() -> None:
    counts = {name: count for name, node, count in functions() if not is_kernel(node) and node.name not in PUBLIC}
    largest = max(counts, key=counts.__getitem__)
    print(f"largest of {len(counts)}: {largest}, {counts[largest]}")
    assert counts[largest] < 8, largest


def test_kernels_have_at_most_sixteen_parameters() -> None:
    counts = {name: count for name, node, count in functions() if is_kernel(node)}
    largest = max(counts, key=counts.__getitem__)
    print(f"largest of {len(counts)}: {largest}, {counts[largest]}")
    assert counts[largest] <= 16, largest


@pytest.mark.skipif(
    cpu_backend.unsupported(torch.device("cpu"), torch.float32) is not None, reason="no native CPU backend"
)
@pytest.mark.parametrize("training", [True, False])
def test_few_files_lie_between_a_layer_and_its_kernels(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPT_BACKEND", "cpu")
    layer = EPTLinear(48, 40, config=EPTConfig(num_tasks=1)).train(training)
    x = torch.randn(5, 48)
    files: list[str] = []

    def watch(frame, event: str, _: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and not ROOMS.isdisjoint(path.parents):
            files.append(str(path.relative_to(REPOSITORY)))

    with torch.set_grad_enabled(training):
        layer.forward(x)  # what is loaded or kept at first
        sys.setprofile(watch)
        try:
            layer.forward(x)
        finally:
            sys.setprofile(None)
    walked = list(dict.fromkeys(files))
    print(len(walked), *walked)
    assert files.count("ept_kernels/tracing.py") > 0, "the profile sees what runs"
    assert len(walked) <= 14
