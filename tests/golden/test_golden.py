"""What was saved by the code of November 2026 loads, computes and saves the same."""

from __future__ import annotations

import importlib
import importlib.util
import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from . import cases

#: Two backends or processors sum in another order: a few units in the last place of fp32, on outputs of this size.
TOLERANCE = 2e-5

#: Every public name of November 2026, by module; never edited. What is no more is in ``gone.json``, with the reason.
PUBLIC = json.loads((cases.HERE / "public_names.json").read_text())
GONE = json.loads((cases.HERE / "gone.json").read_text())


def assert_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def assert_same_output(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * expected.abs().max().item())


def load_base() -> nn.Module:
    base = cases.base_model()
    base.load_state_dict(load_file(cases.HERE / "base.safetensors"))
    return base


@pytest.mark.parametrize("name", cases.ADAPTERS)
def test_an_adapter_computes_what_it_did_and_is_saved_as_it_was(name: str, tmp_path: Path) -> None:
    folder = cases.HERE / "adapters" / name
    model = peft.PeftModel.from_pretrained(load_base(), folder).eval()
    with torch.no_grad():
        logits = model(**cases.batch(), task_ids=cases.ADAPTERS[name].task_ids).logits
    expected = load_file(folder / "expected.safetensors")["logits"]
    assert_same_output(logits, expected)
    with torch.no_grad(), model.disable_adapter():
        plain = model(**cases.batch()).logits
    assert (plain - expected).abs().max() > 100 * TOLERANCE * expected.abs().max()  # the adapter's part is seen

    model.save_pretrained(tmp_path)
    assert_same_tensors(
        load_file(tmp_path / "adapter_model.safetensors"), load_file(folder / "adapter_model.safetensors")
    )
    configs = [json.loads((path / "adapter_config.json").read_text()) for path in (tmp_path, folder)]
    for config in configs:
        del config["peft_version"], config["base_model_name_or_path"]
        config["target_modules"] = sorted(config["target_modules"])
    assert configs[0] == configs[1]


@pytest.mark.parametrize("name", cases.LAYERS)
def test_a_layer_loads_its_state_and_computes_what_it_did(name: str) -> None:
    state = load_file(cases.HERE / "layers" / f"{name}.safetensors")
    expected = state.pop("expected")
    layer = cases.make_layer(name).eval()
    layer.load_state_dict(state)
    with torch.no_grad():
        assert_same_output(layer(cases.layer_input(), torch.tensor([3, 0, 2, 0])), expected)
    assert_same_tensors(layer.state_dict(), state)


def test_the_record_of_public_names_is_whole() -> None:
    assert (len(PUBLIC), sum(map(len, PUBLIC.values()))) == (163, 701)
    assert all(gone["why"] and set(gone["names"]) <= set(PUBLIC[module]) for module, gone in GONE.items())


@pytest.mark.parametrize("module", PUBLIC)
def test_a_public_name_is_still_imported_from_where_it_was(module: str) -> None:
    gone = GONE.get(module, {"names": []})["names"]
    if module in GONE and gone == PUBLIC[module]:
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(module)
        return
    if module.startswith("ept_kernels.triton") and importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton, which is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found = importlib.import_module(module)
        missing = [name for name in PUBLIC[module] if not hasattr(found, name)]
    assert missing == gone
