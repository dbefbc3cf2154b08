"""What went wrong once: states that two features reach together, and callers that pass a layer by."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as plain_checkpoint

import ept

from .conftest import CASES, Case, adapted, awaken

MIXED = ["gamma", "alpha", "beta"]


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loads_under_another_name(case: Case, tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    base = case.build().eval()
    model = adapted(case, base)
    model.save_pretrained(tmp_path)
    batch = case.batch()
    with torch.no_grad():
        expected = model(**batch, task_ids=MIXED).logits
        renamed = peft.PeftModel.from_pretrained(
            copy.deepcopy(base), tmp_path, adapter_name="other", low_cpu_mem_usage=low_cpu_mem_usage
        ).eval()
        assert torch.equal(renamed(**batch, task_ids=MIXED).logits, expected)
        awaken(model)
        model.load_adapter(tmp_path, adapter_name="third", low_cpu_mem_usage=low_cpu_mem_usage)
        model.set_adapter("third")
        assert torch.equal(model.eval()(**batch, task_ids=MIXED).logits, expected)


def test_disabling_a_merged_adapter_takes_it_out_everywhere(case: Case) -> None:
    base = case.build().eval()
    model, batch = adapted(case, base), case.batch()
    with torch.no_grad():
        wanted = model(**batch, task_ids=0).logits
        other = model(**batch, task_ids=1).logits
        model.merge_adapter(task=0)
        with model.disable_adapter():
            model(**batch)
        assert torch.equal(model(**batch, task_ids=1).logits, other)
        plain = model.merge_and_unload(task=0)
        torch.testing.assert_close(plain(**batch).logits, wanted, atol=1e-4, rtol=1e-3)


def _encoder() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def test_transformer_encoder_fast_path_does_not_pass_the_tuner_by() -> None:
    config = ept.EPTConfig(r=4, num_tasks=2, target_modules=["linear1", "linear2"])
    model = awaken(peft.get_peft_model(_encoder(), config))
    x = torch.randn(3, 5, 32)
    with torch.no_grad():
        trained = model.train()(x, task_ids=1)
        torch.testing.assert_close(model.eval()(x, task_ids=1), trained, atol=1e-5, rtol=1e-4)


def test_transformer_encoder_fast_path_does_not_pass_a_layer_by() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
    config = ept.EPTConfig(r=4, num_tasks=2)
    layer.linear1 = awaken(ept.EPTLinear.from_linear(layer.linear1, config))
    x = torch.randn(3, 5, 32)
    with torch.no_grad(), ept.use_tasks(1):
        torch.testing.assert_close(layer.eval()(x), layer.train()(x), atol=1e-5, rtol=1e-4)
    with torch.no_grad(), pytest.raises(ValueError, match="task_ids is missing"):
        layer.eval()(x)


def test_a_target_that_is_never_called_is_refused() -> None:
    with pytest.raises(ValueError, match=r"out_proj.*MultiheadAttention.*no effect"):
        peft.get_peft_model(_encoder(), ept.EPTConfig(num_tasks=2, target_modules=["out_proj"]))


def test_generate_and_use_tasks_count_the_ids() -> None:
    case = CASES["llama"]
    model = adapted(case, case.build())
    ids = torch.randint(3, 64, (4, 7))
    with pytest.raises(ValueError, match="one id for each of the 4 samples"):
        model.generate(input_ids=ids, task_ids=["alpha", "beta"], max_new_tokens=2)
    with pytest.raises(ValueError, match="one id for each of the 4 samples"), ept.use_tasks([0, 1]):
        model(input_ids=ids)


@pytest.mark.parametrize("tasks", ["beta", ["alpha", "beta", "gamma"], [0, 1, 2]])
def test_use_tasks_takes_names_and_lists(tasks: object) -> None:
    case = CASES["bert"]
    model, batch = adapted(case, case.build()).train(), case.batch()
    with ept.use_tasks(tasks):
        logits = model(**batch).logits
        assert ept.contrastive_loss(model).isfinite()
    assert torch.equal(logits, model(**batch, task_ids=tasks).logits)
    model.merge_adapter(task="beta")
    with ept.use_tasks("beta"):
        model(**batch)
    with pytest.raises(ValueError, match="task_ids must be 1"), ept.use_tasks(["alpha", "beta", "beta"]):
        model(**batch)


def test_names_that_differ_between_active_adapters_are_refused() -> None:
    case = CASES["bert"]
    model = adapted(case, case.build(), task_names=["a", "b"], task_type=None)
    model.add_adapter("second", case.config(task_names=["b", "a"], task_type=None))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="name their tasks differently"):
        model(**case.batch(), task_ids="b")
    with pytest.raises(ValueError, match="means different tasks"):
        model.merge_adapter(task="b")
    model(**case.batch(), task_ids=1)


class Headed(nn.Module):
    """A model that wants the task ids itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.heads = nn.Linear(16, 16), nn.Parameter(torch.randn(2, 16))

    def forward(self, x: torch.Tensor, task_ids: torch.Tensor | int | None = None) -> torch.Tensor:
        assert task_ids is not None
        return (self.body(x) * self.heads[task_ids]).sum(-1)


def test_a_model_that_wants_task_ids_gets_them_with_the_adapter_disabled() -> None:
    base = Headed()
    model = awaken(peft.get_peft_model(copy.deepcopy(base), ept.EPTConfig(num_tasks=2, target_modules=["body"])))
    x, ids = torch.randn(3, 16), torch.tensor([0, 1, 1])
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(x, task_ids=ids), base(x, ids))
    with torch.no_grad():
        assert not torch.equal(model(x, task_ids=ids), base(x, ids))


def test_the_successor_of_a_deleted_adapter_trains_its_table() -> None:
    case = CASES["bert"]
    model = adapted(case, case.build())
    model.add_adapter("second", case.config())
    model.delete_adapter("default")
    assert model.base_model.ept_task_tables["second"].weight.requires_grad
    assert sum(ept.parameter_breakdown(model).values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_merged_layer_saves_and_loads_its_own_weight() -> None:
    config = ept.EPTConfig(num_tasks=2, r=2)
    layer = awaken(ept.EPTLinear(16, 16, config=config))
    clean = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = torch.randn(3, 16)
    with torch.no_grad():
        wanted = layer(x, 1)
        layer.merge(1)
        assert all(torch.equal(tensor, clean[name]) for name, tensor in layer.state_dict().items())
        layer.load_state_dict(clean)
        assert not layer.merged
        assert torch.equal(layer(x, 1), wanted)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_remembers_the_block_it_was_called_in(use_reentrant: bool) -> None:
    config = ept.EPTConfig(num_tasks=2, r=2)
    layer = awaken(ept.EPTLinear(16, 16, config=config))
    x = torch.randn(4, 16, requires_grad=True)

    def gradient(function) -> torch.Tensor:
        layer.zero_grad()
        with ept.use_tasks([0, 1, 1, 0]):
            output = function(layer, x)
        with ept.use_tasks([1, 1, 0, 0]):
            output.square().sum().backward()
        return layer.A.grad.clone()

    expected = gradient(lambda function, rows: function(rows))
    found = gradient(lambda function, rows: ept.checkpoint(function, rows, use_reentrant=use_reentrant))
    assert torch.equal(found, expected)
    plain = gradient(lambda function, rows: plain_checkpoint(function, rows, use_reentrant=use_reentrant))
    assert torch.equal(plain, expected)
    with ept.use_tasks([1, 1, 0, 0]):
        assert not torch.allclose(layer(x), layer(x, [0, 1, 1, 0])), "else this test shows nothing"


def test_per_sample_adapters_are_refused() -> None:
    case = CASES["bert"]
    model = adapted(case, case.build())
    with pytest.raises(ValueError, match="adapter_names is not supported"):
        model(**case.batch(), task_ids=0, adapter_names=["default"] * 3)
