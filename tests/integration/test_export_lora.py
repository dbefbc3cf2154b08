"""``export_lora``: PEFT's own LoRA, in a process without ``ept``, gives the task's logits."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from baselines_testing import awaken_all
from export_testing import assert_unchanged, bits, train_heads, without_ept
from peft.tuners.lora import LoraLayer as PeftLoraLayer
from pyramid_testing import assert_matches, relative_error
from safetensors.torch import load_file
from torch import nn

import ept

from .conftest import CASES, Case, adapted, awaken
from .test_export_merged import AUTO

LOAD = """
from transformers import {auto} as Auto
from peft import PeftModel
def result(batch):
    return PeftModel.from_pretrained(Auto.from_pretrained({base!r}), {path!r}).eval()(**batch).logits
"""


@pytest.mark.parametrize("name", ["llama", "t5", "bert", "gpt2"])
def test_loads_in_plain_peft_with_equal_logits(name: str, tmp_path: Path) -> None:
    torch.manual_seed(11)
    case = CASES[name]
    heads = ["classifier"] if name == "bert" else None
    base = case.build().eval()
    base.save_pretrained(tmp_path / "base")
    model = train_heads(adapted(case, base, modules_to_save=heads))
    before, batch = bits(model), case.batch()
    with torch.no_grad():
        expected = model(**batch, task_ids="gamma").logits
    report = ept.export_lora(model, "gamma", tmp_path / "lora")
    assert_unchanged(model, before)
    script = LOAD.format(auto=AUTO[name], base=str(tmp_path / "base"), path=str(report.path))
    assert_matches(without_ept(script, batch, tmp_path), expected, 1e-5)
    assert sorted(file.name for file in report.path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_ranks_are_those_of_the_active_scales(case: Case, tmp_path: Path) -> None:
    base = case.build().eval()
    model, batch = adapted(case, base), case.batch()
    sizes = model.peft_config["default"].kernel_sizes
    routes = ept.routing(model)
    for task in range(3):
        report = ept.export_lora(model, task, tmp_path / str(task), rank_pattern=True)
        for name, layer in report.layers.items():
            scales = {sizes[expert] for expert in routes[name][0][task].tolist()}
            assert layer.rank == layer.exact_rank == 4 * sum(scales)
            assert layer.error == 0 and layer.norm > 0
        assert report.error == 0 and report.max_rank == max(layer.rank for layer in report.layers.values())
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / str(task)).eval()
        loras = {n: m for n, m in loaded.base_model.model.named_modules() if isinstance(m, PeftLoraLayer)}
        assert {n: m.r["default"] for n, m in loras.items()} == {n: x.rank for n, x in report.layers.items()}
        assert all(m.scaling["default"] == 1 for m in loras.values())
        factors = [p for m in loras.values() for n, p in m.named_parameters() if "lora_" in n]
        assert report.parameters == sum(p.numel() for p in factors)
        with torch.no_grad():
            assert_matches(loaded(**batch).logits, model(**batch, task_ids=task).logits, 1e-5)


#: What readers scale ``lora_B @ lora_A`` by, given the config and the rank of the layer's tensors.
READERS = {
    "vLLM": lambda config, rank: config["lora_alpha"] / config["r"],
    "llama.cpp": lambda config, rank: config["lora_alpha"] / rank,
}


@pytest.mark.parametrize("rank", [None, 9])
@pytest.mark.parametrize(
    "config",
    [ept.EPTConfig(r=4, num_tasks=3), ept.MoREConfig(r=4, num_tasks=3)],
    ids=["ept", "more"],
)
def test_every_reader_finds_the_update(config: peft.PeftConfig, rank: int | None, tmp_path: Path) -> None:
    case = CASES["llama"]
    base = case.build().eval()
    config = copy.deepcopy(config)
    config.task_type, config.target_modules = "CAUSAL_LM", "all-linear"
    model = awaken_all(peft.get_peft_model(copy.deepcopy(base), config)).eval()
    report = ept.export_lora(model, 1, tmp_path / "lora", rank)
    assert len({layer.rank for layer in report.layers.values()}) > 1, "else this test shows nothing"
    written = json.loads((report.path / "adapter_config.json").read_text())
    tensors = load_file(report.path / "adapter_model.safetensors")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), report.path)
    assert report.parameters == sum(tensor.numel() for tensor in tensors.values())
    for name, layer in report.layers.items():
        lora_A, lora_B = (tensors[f"base_model.model.{name}.lora_{key}.weight"] for key in "AB")
        assert lora_A.shape[0] == lora_B.shape[1] == report.max_rank
        assert not lora_A[layer.rank :].any() and not lora_B[:, layer.rank :].any()
        expected = loaded.base_model.model.get_submodule(name).get_delta_weight("default")
        for scale in READERS.values():
            assert_matches(scale(written, len(lora_A)) * lora_B @ lora_A, expected, 1e-6)
        if rank is None:
            assert_matches(expected, ept.adapters(model)[name].delta_weight(1), 1e-5)


@pytest.mark.parametrize("rank", [1, 6, 1000])
def test_truncated_error_is_what_is_reported(rank: int, tmp_path: Path) -> None:
    case = CASES["gpt2"]
    base = case.build().eval()
    model = adapted(case, base)
    report = ept.export_lora(model, "beta", tmp_path / "lora", rank)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), report.path)
    missing, whole = [], []
    for name, adapter in ept.adapters(model).items():
        exact = adapter.delta_weight("beta").detach()
        found = loaded.base_model.model.get_submodule(name).get_delta_weight("default").T
        layer = report.layers[name]
        assert layer.rank == min(rank, layer.exact_rank)
        assert relative_error(found, exact) == pytest.approx(layer.error, rel=1e-3, abs=1e-6)
        assert exact.norm().item() == pytest.approx(layer.norm, rel=1e-5)
        missing.append((found - exact).norm()), whole.append(exact.norm())
    expected = torch.stack(missing).norm() / torch.stack(whole).norm()
    assert report.error == pytest.approx(expected.item(), rel=1e-3, abs=1e-6)
    assert (report.error < 1e-6) == (rank == 1000)


@pytest.mark.parametrize(
    "config",
    [
        ept.MoREConfig(r=4, num_tasks=3),
        ept.MOELoRAConfig(r=6, num_experts=3, num_tasks=3),
        ept.DCFTConfig(kernel_size=4, num_tasks=3),
    ],
    ids=["more", "moelora", "dcft"],
)
def test_baselines(config: peft.PeftConfig, tmp_path: Path) -> None:
    case = CASES["llama"]
    base = case.build().eval()
    config = copy.deepcopy(config)
    config.task_type, config.target_modules = "CAUSAL_LM", "all-linear"
    model = awaken_all(peft.get_peft_model(copy.deepcopy(base), config)).eval()
    batch = case.batch()
    ept.export_lora(model, 1, tmp_path / "lora")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora").eval()
    with torch.no_grad():
        assert_matches(loaded(**batch).logits, model(**batch, task_ids=1).logits, 1e-5)


@pytest.mark.parametrize("rank_pattern", [False, True])
def test_an_untrained_adapter_is_a_lora_that_does_nothing(rank_pattern: bool, tmp_path: Path) -> None:
    case = CASES["llama"]
    base = case.build().eval()
    model = peft.get_peft_model(copy.deepcopy(base), case.config()).eval()
    report = ept.export_lora(model, 0, tmp_path / "lora", rank_pattern=rank_pattern)
    assert report.max_rank == 1 and report.error == 0
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), report.path).eval()
    batch = case.batch()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, base(**batch).logits)


class Confusing(nn.Module):
    """Two modules of the same last name, one of which ends in the other's whole name."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.ModuleDict({"b": nn.Linear(16, 16), "a": nn.ModuleDict({"b": nn.Linear(16, 16)})})
        self.b = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a["a"]["b"](self.a["b"](x)))


@pytest.mark.parametrize("targets", [r"a\.b", r"a\.b|a\.a\.b", r"b|a\.b|a\.a\.b"])
def test_exactly_the_adapted_layers_are_targeted(targets: str, tmp_path: Path) -> None:
    base = Confusing()
    config = ept.EPTConfig(r=2, num_tasks=2, kernel_sizes=(2, 3, 5, 7), top_k=1, target_modules=targets)
    model = awaken(peft.get_peft_model(copy.deepcopy(base), config))
    for task in range(2):
        ept.export_lora(model, task, tmp_path / "lora", overwrite=True)
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora")
        x = torch.randn(3, 16)
        with torch.no_grad(), ept.use_tasks(task):
            assert_matches(loaded(x), model(x), 1e-5)


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, "8"])
def test_bad_ranks(rank: object, tmp_path: Path) -> None:
    case = CASES["bert"]
    with pytest.raises(ValueError, match="rank must be None or an integer >= 1"):
        ept.export_lora(adapted(case, case.build()), 0, tmp_path / "lora", rank)
    assert list(tmp_path.iterdir()) == []


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    case = CASES["bert"]
    model = adapted(case, case.build())
    next(p for n, p in model.named_parameters() if n.endswith("ept_adapters.default.B")).data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"query' has an update that is not finite"):
        ept.export_lora(model, 0, tmp_path / "lora")
    with pytest.raises(ValueError, match=r"query\.B of seed\.safetensors is not finite"):
        ept.export_deltas(model, tmp_path / "deltas")
    assert list(tmp_path.iterdir()) == []


def test_the_config_says_where_it_comes_from(tmp_path: Path) -> None:
    case = CASES["bert"]
    model = adapted(case, case.build(), revision="abc")
    model.peft_config["default"].base_model_name_or_path = "somebody/base"
    ept.export_lora(model, 0, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "somebody/base" and config["revision"] == "abc"
    assert config["peft_type"] == "LORA" and config["task_type"] == "SEQ_CLS"
    assert config["lora_alpha"] == config["r"] and config["inference_mode"] is True
