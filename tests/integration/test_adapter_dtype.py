"""``autocast_adapter_dtype=False``: the adapter of a half base is half too, as FSDP1 wants it; by default fp32."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from baselines_testing import awaken_all
from pyramid_testing import relative_error

import ept

from .conftest import CASES

TARGETS = {"target_modules": ["q_proj", "down_proj", "up_proj", "gate_proj"], "num_tasks": 3, "task_type": "CAUSAL_LM"}
CONFIGS = {
    "ept": lambda: ept.EPTConfig(r=2, kernel_sizes=(2, 4), auto_routing=True, **TARGETS),
    "ept, tokens route": lambda: ept.EPTConfig(r=2, kernel_sizes=(2, 4), routing="token", **TARGETS),
    "more": lambda: ept.MoREConfig(r=4, **TARGETS),
    "moelora": lambda: ept.MOELoRAConfig(r=4, num_experts=2, **TARGETS),
    "dcft": lambda: ept.DCFTConfig(kernel_size=4, **TARGETS),
    "mixlora": lambda: ept.MixLoRAConfig(
        r=2, num_experts=2, **{**TARGETS, "target_modules": TARGETS["target_modules"][1:]}
    ),
    "tucka": lambda: ept.TuckAConfig(r=2, **TARGETS),
}
IDS = [0, 2, 1]


def _dtypes(model: peft.PeftModel) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_half_adapter_trains_and_computes_what_an_fp32_one_does(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    case = CASES["llama"]
    base, batch = case.build().to(dtype), case.batch()
    state = {key: value.clone() for key, value in base.state_dict().items()}
    half = awaken_all(peft.get_peft_model(base, CONFIGS[name](), autocast_adapter_dtype=False), std=0.1)
    assert _dtypes(half) == {dtype}
    loss = half(**batch, labels=batch["input_ids"], task_ids=IDS).loss + ept.auxiliary_loss(half)
    loss.backward()
    assert loss.isfinite()
    gradients = [p.grad for p in half.parameters() if p.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)

    other = case.build().to(dtype)
    other.load_state_dict(state)
    wide = peft.get_peft_model(other, CONFIGS[name]())
    assert _dtypes(wide) == {torch.float32}
    wide.load_state_dict(half.state_dict())
    with torch.no_grad():
        found, expected = (model.eval()(**batch, task_ids=IDS).logits.float() for model in (half, wide))
    assert relative_error(found, expected) < 0.05


def test_statistics_of_a_half_adapter_stay_fp32() -> None:
    model = peft.get_peft_model(CASES["llama"].build().bfloat16(), CONFIGS["ept"](), autocast_adapter_dtype=False)
    assert model.base_model.ept_task_tables["default"].prototypes.mean.dtype == torch.float32


@pytest.mark.parametrize("autocast", [False, True])
def test_loading_and_adding_honour_it(autocast: bool, tmp_path: Path) -> None:
    wanted = torch.float32 if autocast else torch.bfloat16
    base = CASES["llama"].build().bfloat16()
    peft.get_peft_model(base, CONFIGS["ept"](), autocast_adapter_dtype=False).save_pretrained(tmp_path)
    other, options = CASES["llama"].build().bfloat16(), {"autocast_adapter_dtype": autocast}
    model = peft.PeftModel.from_pretrained(other, tmp_path, is_trainable=True, **options)
    assert _dtypes(model) == {wanted}
    model.add_adapter("second", CONFIGS["ept"](), **options)
    model.set_adapter("second")
    assert _dtypes(model) == {wanted}
