"""Names of tasks under ``torch.compile``: resolved before the compiled region, so that no batch is compiled anew."""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from baselines_testing import awaken_all
from torch import Tensor, nn

import ept

pytestmark = pytest.mark.skipif(sys.version_info >= (3, 15), reason="torch.compile does not know this Python yet")

NAMES = ["alpha", "beta", "gamma"]
MIXED = [list(names) for names in itertools.product(NAMES, repeat=3)][:12]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class Around(nn.Module):
    """A module of somebody's own with an adapted model inside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, task_ids: Any) -> Tensor:
        return self.inner(x, task_ids=task_ids) + 1


def _model() -> peft.PeftModel:
    config = ept.EPTConfig(r=2, task_names=NAMES, kernel_sizes=(2, 4), target_modules=["fc"])
    return awaken_all(peft.get_peft_model(Net(), config)).eval()


def _compile(model: nn.Module, **options: Any) -> tuple[Callable[..., Tensor], Any]:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    return torch.compile(model, backend=counter, **options), counter


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("given", ["names", "lists of ids", "one name"])
def test_no_batch_is_compiled_anew(given: str, fullgraph: bool) -> None:
    model, x = _model(), torch.randn(3, 4, 16)
    compiled, counter = _compile(model, fullgraph=fullgraph)
    batches = {
        "names": MIXED,
        "lists of ids": [[NAMES.index(name) for name in names] for names in MIXED],
        "one name": NAMES * 2,
    }
    with torch.no_grad():
        for task_ids in batches[given]:
            torch.testing.assert_close(compiled(x, task_ids=task_ids), model(x, task_ids=task_ids))
    assert counter.frame_count <= 2


def test_a_wrong_name_is_named() -> None:
    compiled, _ = _compile(_model(), fullgraph=True)
    with pytest.raises(ValueError, match="unknown task 'delta'; allowed: 0 to 2, or a name among alpha, beta, gamma"):
        compiled(torch.randn(3, 4, 16), task_ids=["alpha", "delta", "beta"])


def test_an_adapted_model_inside_a_compiled_one_breaks_no_graph() -> None:
    outer, x = Around(_model()), torch.randn(3, 4, 16)
    compiled, counter = _compile(outer, fullgraph=True)
    with torch.no_grad():
        for ids in (torch.tensor([0, 1, 2]), torch.tensor([2, 2, 1])):
            torch.testing.assert_close(compiled(x, ids), outer(x, ids))
        torch.testing.assert_close(compiled(x, NAMES), outer(x, NAMES))
    assert counter.frame_count <= 3


def test_a_copy_resolves_by_its_own_tasks() -> None:
    model = _model()
    twin = copy.deepcopy(model)
    twin.base_model.ept_task_tables["default"].names = ("one", "two", "three")
    x = torch.randn(3, 4, 16)
    with torch.no_grad():
        assert torch.equal(twin(x, task_ids=["one", "three", "two"]), model(x, task_ids=["alpha", "gamma", "beta"]))
    with pytest.raises(ValueError, match="unknown task 'alpha'"):
        twin(x, task_ids=NAMES)
