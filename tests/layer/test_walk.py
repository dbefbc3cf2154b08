"""How far a layer's ``forward`` is from the backend that computes it, in files that a reader follows."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import peft
import pytest
import torch
from torch import nn

import ept
import ept_kernels

HERE = [Path(package.__file__).parent for package in (ept, ept_kernels)]
BACKENDS = HERE[1] / "backends"
CONFIG = ept.EPTConfig(r=2, num_tasks=3, kernel_sizes=(2, 4), target_modules=["0"])


def files_between(call: Callable[[], Any]) -> list[str]:
    """Files of this project on the stack when a backend is called; the longest such stack."""
    stacks: list[list[str]] = [[]]

    def watch(frame: FrameType | None, event: str, argument: object) -> None:
        if event != "call" or frame is None or BACKENDS not in Path(frame.f_code.co_filename).parents:
            return
        stack: list[Path] = []
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path not in stack and any(root in path.parents for root in HERE):
                stack.append(path)
            frame = frame.f_back
        stacks.append([path.name for path in reversed(stack)])

    call()  # what is loaded at the first call is no part of the walk
    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return max(stacks, key=len)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["layer", "model"])
def test_a_reader_gets_from_forward_to_the_backend_through_seven_files(kind: str, training: bool) -> None:
    module: Any = ept.EPTLinear(6, 5, config=CONFIG) if kind == "layer" else None
    if module is None:
        module = peft.get_peft_model(nn.Sequential(nn.Linear(6, 5)), CONFIG)
    module.train(training)
    x = torch.randn(4, 2, 6)
    with torch.set_grad_enabled(training):
        walk = files_between(lambda: module(x, task_ids=torch.tensor([0, 2, 1, 0])))
    assert walk and walk[0] == ("adapted_linear.py" if kind == "layer" else "layer.py")
    assert len(walk) <= 7, f"{' -> '.join(walk)}"
