"""``ept_kernels``' functions with hostile arguments, in a process of their own, which a crash would end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ept_kernels
from ept_kernels import Kept, PyramidGeometry

from .support import COUNTED, FACTOR

_HERE = Path(__file__).parent
GEOMETRY = PyramidGeometry(10, 12, 3, (2, 3, 2))


@pytest.mark.parametrize("backend", ["", "torch"], ids=["automatic", "torch"])
def test_hostile_arguments_end_in_a_named_error_or_a_right_answer(backend: str) -> None:
    count = 200 * FACTOR
    paths = [
        str(_HERE),
        str(_HERE.parent / "support"),
        str(Path(ept_kernels.__file__).parents[1]),
        os.environ.get("PYTHONPATH", ""),
    ]
    environment = os.environ | {"EPT_BACKEND": backend, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-W", "ignore", "-m", "hostile_calls", "0", str(count)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300 + count)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"seed {lines[-1] if lines else None} ended the process:\n{done.stderr}"
    report = json.loads(lines[-1])
    COUNTED[f"op arguments ({backend or 'automatic'})"].update(report["outcomes"])
    assert not report["wrong"], "\n".join(report["wrong"])


def _call(**changed: object) -> torch.Tensor:
    torch.manual_seed(0)
    arguments = {
        "x": torch.randn(4, 10),
        "A": torch.randn(3, GEOMETRY.seed_width),
        "B": torch.randn(GEOMETRY.seed_height, 3),
        "folded": torch.randn(2, GEOMETRY.folded_size),
        "groups": torch.tensor([0, 1, 1, 0]),
        "geometry": GEOMETRY,
    }
    return ept_kernels.pyramid_delta(*(arguments | changed).values())


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"A": torch.ones(3, 5, device="meta")}, ValueError, "A must be on the device of x, cpu, got meta"),
        ({"x": torch.ones(4, 10, device="meta")}, ValueError, "A must be on the device of x, meta, got cpu"),
        ({"A": torch.ones(3, 5, dtype=torch.complex64)}, ValueError, "A must be a floating-point tensor, got"),
        ({"folded": torch.ones(2, 13, dtype=torch.int64)}, ValueError, "folded must be a floating-point tensor, got"),
        ({"x": torch.ones(4, 10).to_sparse()}, ValueError, "x must be a dense tensor, got one of layout"),
        ({"B": None}, TypeError, "B must be a tensor, got NoneType"),
        ({"groups": [0, 1, 1, 0]}, TypeError, "groups must be a tensor, got list"),
        ({"geometry": None}, TypeError, "geometry must be a PyramidGeometry, got NoneType"),
        ({"groups": torch.tensor([0, 1, -1, 0])}, IndexError, "groups holds -1; allowed: 0 to 1"),
    ],
)
def test_what_used_to_crash_or_to_be_wrong(changed: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _call(**changed)


@pytest.mark.parametrize("name", ["x", "A", "B", "folded"])
def test_a_lazy_negation_is_seen(name: str) -> None:
    """``_neg_view`` is what the imaginary part of a conjugate is: its memory holds the opposite numbers."""
    tensor = {"x": (4, 10), "A": (3, 5), "B": (6, 3), "folded": (2, 13)}[name]
    negative = torch._neg_view(torch.randn(tensor))
    plain = negative.clone()
    results = []
    for given in (negative, plain):
        leaf = given.detach().requires_grad_()
        output = _call(**{name: leaf})
        results.append((output, *torch.autograd.grad(output.square().sum(), leaf)))
    for seen, expected in zip(*results, strict=True):
        torch.testing.assert_close(seen, expected)


@pytest.mark.parametrize("tasks", [1.5, "a", True, [1], torch.tensor([0.7]), torch.tensor([True])])
@pytest.mark.parametrize("kept", [False, True])
def test_ids_that_are_no_integers_are_not_read_as_others(tasks: object, kept: bool) -> None:
    kernels = [torch.ones(k, k) for k in GEOMETRY.kernel_sizes]
    call = (torch.ones(3, 5), torch.ones(4, 5), tasks, kernels, 2, 1.0, GEOMETRY)
    with torch.no_grad(), pytest.raises((TypeError, ValueError), match="tasks must be"):
        ept_kernels.fold_kept(Kept(), Kept(), *call) if kept else ept_kernels.fold_tasks(*call)
