"""What is said of a saved adapter is what the model does."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig
from rich.console import Console
from safetensors.torch import load_file, save_file

import ept
from ept.inspecting.cli import main
from ept.inspecting.console import print_inspection
from ept.inspecting.experts import ranks_of
from ept.inspecting.page import draw_inspection, write_page
from ept.inspecting.summary import inspect_adapter, select
from ept.saved import AdapterError, read_adapter
from ept_kernels import reference


def test_parameters_gates_and_similarity_are_those_of_the_model(adapter: SimpleNamespace) -> None:
    found = inspect_adapter(read_adapter(adapter.folder))
    assert found.tasks == tuple(ept.task_names(adapter.model))
    counts = {part: count for part, count in ept.parameter_breakdown(adapter.model).items() if count}
    assert found.parameters == counts
    routing = ept.routing(adapter.model)
    assert [layer.name for layer in found.layers] == sorted(routing)
    for layer in found.layers:
        index, gates = routing[layer.name]
        dense = torch.zeros(len(index), 6).scatter(1, index, gates)
        torch.testing.assert_close(torch.tensor(layer.gates), dense)
        unused = [place for place in range(6) if not dense[:, place].any()]
        assert list(layer.dead) == unused
        assert [bool(expert.tasks) for expert in layer.experts] == [place not in unused for place in range(6)]
    embeddings = torch.nn.functional.normalize(ept.task_embeddings(adapter.model).double(), dim=-1)
    np.testing.assert_allclose(found.similarity, (embeddings @ embeddings.T).numpy(), atol=1e-12)


def test_ranks_are_those_of_the_dense_updates(adapter: SimpleNamespace) -> None:
    layers = ept.adapters(adapter.model)
    for layer in inspect_adapter(read_adapter(adapter.folder)).layers:
        own = layers[layer.name]
        assert (layer.out_features, layer.in_features) == (own.out_features, own.in_features)
        kernels = [kernel.detach().double() for kernel in own.kernels]
        gates = torch.tensor(layer.gates, dtype=torch.float64)
        folded = reference.fold_kernels(kernels, gates, own.scaling, own.geometry)
        dense = reference.pyramid_weight(own.A.detach().double(), own.B.detach().double(), folded, own.geometry)
        for ranks, update in zip(layer.updates, dense, strict=True):
            values = torch.linalg.svdvals(update)
            smallest = max(own.out_features, own.in_features) * torch.finfo(torch.float32).eps * values[0]
            shares = values / values.sum()
            assert ranks.rank == int((values > smallest).sum())
            assert ranks.stable == pytest.approx((values.square().sum() / values[0] ** 2).item(), rel=1e-9)
            assert ranks.norm == pytest.approx(values.square().sum().sqrt().item(), rel=1e-9)
            assert ranks.entropy == pytest.approx((-torch.special.xlogy(shares, shares)).sum().exp().item(), rel=1e-9)


def test_effective_rank_is_r_times_the_rank_of_the_kernel(save: Callable) -> None:
    _, folder = save()
    tensors = load_file(folder / "adapter_model.safetensors")
    key = next(key for key in tensors if key.endswith("kernels.5"))
    column = torch.randn(8, 2)
    tensors[key] = column @ column.T
    tensors[key.replace("kernels.5", "kernels.4")] = torch.zeros(6, 6)
    save_file(tensors, folder / "adapter_model.safetensors")
    name = key.removeprefix("base_model.model.").partition(".ept_adapters")[0]
    (layer,) = select(inspect_adapter(read_adapter(folder)), layers=re.escape(name)).layers
    assert [expert.effective_rank for expert in layer.experts][4:] == [0, 3 * 2]
    assert layer.experts[4].entropy == 0.0


def test_ranks_of_known_matrices() -> None:
    identity = ranks_of(torch.eye(5), 1e-6)
    assert identity.rank == 5
    assert (identity.stable, identity.entropy) == pytest.approx((5.0, 5.0))
    assert ranks_of(torch.outer(torch.arange(1.0, 4), torch.ones(7)), 1e-6).entropy == pytest.approx(1.0)
    assert ranks_of(torch.zeros(2, 3), 1e-6).rank == 0


def test_selection_keeps_one_task_and_some_layers(adapter: SimpleNamespace, capsys: pytest.CaptureFixture) -> None:
    whole = inspect_adapter(read_adapter(adapter.folder))
    part = select(whole, task=whole.tasks[2], layers="q_proj$")
    assert part.tasks == whole.tasks[2:]
    assert [layer.name for layer in part.layers] == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    full = {layer.name: layer for layer in whole.layers}
    for layer in part.layers:
        assert layer.gates == full[layer.name].gates[2:]
        assert layer.dead == full[layer.name].dead
    with pytest.raises(SystemExit) as stopped:
        main([str(adapter.folder), "--task", "omega"])
    assert stopped.value.code == 2
    assert "'omega' is no task of this adapter; allowed: alpha" in capsys.readouterr().err


def test_command_prints_and_writes(adapter: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    files = {"--json": tmp_path / "a.json", "--output": tmp_path / "pictures", "--html": tmp_path / "a.html"}
    arguments = [str(adapter.folder), *(str(part) for pair in files.items() for part in pair)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for words in ("EPT adapter", "Effective ranks", "Gates", "dead experts", "Cosine", "seed", "gamma & <b>delta</b>"):
        assert words in printed
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["tasks"][0] == "alpha"
    assert len(content["layers"]) == 14
    names = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert names == {"expert_use.png", "update_ranks.png", "task_embeddings.png"}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (ept.MoREConfig(num_tasks=3, r=4, target_modules=["q_proj"]), "Gates"),
        (ept.MOELoRAConfig(num_tasks=3, target_modules=["q_proj"]), "Gates"),
        (ept.DCFTConfig(num_tasks=3, kernel_size=4, target_modules=["q_proj"]), "does not give experts to tasks"),
        (
            ept.MixLoRAConfig(num_tasks=3, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"]),
            "does not give experts to tasks",
        ),
        (LoraConfig(r=4, target_modules=["q_proj"]), "does not give experts to tasks"),
    ],
    ids=lambda value: getattr(value, "peft_type", None) and str(value.peft_type.value),
)
def test_other_methods_show_what_applies(
    save: Callable, config: object, says: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model, folder = save(config)
    assert main([str(folder), "--html", str(tmp_path / "a.html"), "--output", str(tmp_path / "pictures")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert says in printed
    assert "has no pyramid" in printed
    found = inspect_adapter(read_adapter(folder))
    assert found.total == sum(p.numel() for p in model.parameters() if p.requires_grad)
    for name, (index, gates) in (ept.routing(model) if says == "Gates" else {}).items():
        (layer,) = (layer for layer in found.layers if layer.name == name)
        dense = torch.zeros(3, len(layer.labels)).scatter(1, index, gates)
        torch.testing.assert_close(torch.tensor(layer.gates), dense)


def test_experts_chosen_by_token_have_no_gates_of_tasks(adapter: SimpleNamespace, tmp_path: Path) -> None:
    saved = read_adapter(adapter.folder)
    saved.config.routing = "token"
    found = inspect_adapter(replace(saved, shared={}))
    assert not any(layer.gates or layer.updates or layer.dead for layer in found.layers)
    assert found.layers[0].experts[3].effective_rank == 3 * 4
    assert "chosen by every token" in found.notes[0]
    write_page(tmp_path / "a.html", found)
    with (tmp_path / "a.txt").open("w") as file:
        print_inspection(found, Console(file=file))
    assert "Effective ranks" in (tmp_path / "a.txt").read_text()
    assert draw_inspection(tmp_path, found, saved) == []


def _no_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def _damaged_config(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{")


def _unknown_method(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "MAGIC"}')


def _bad_setting(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": -1}))


def _pickled_only(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def _truncated(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _not_finite(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    save_file(tensors, folder / "adapter_model.safetensors")


def _other_pyramid(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"kernel_sizes": [2, 2, 3]}))


def _other_tasks(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"task_names": None, "num_tasks": 7}))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_no_config, "has no adapter_config.json"),
        (_damaged_config, "adapter_config.json' cannot be read"),
        (_unknown_method, "peft_type is 'MAGIC'"),
        (_bad_setting, "r must be an integer >= 1"),
        (_pickled_only, "adapter_model.bin can run code"),
        (_truncated, "adapter_model.safetensors' cannot be read"),
        (_not_finite, "not finite in"),
        (_other_pyramid, "does not fit the tensors"),
        (_other_tasks, "3 task embeddings for 7 tasks"),
    ],
)
def test_bad_folders_are_named(
    save: Callable, harm: Callable[[Path], None], message: str, capsys: pytest.CaptureFixture
) -> None:
    _, folder = save(target_modules=["q_proj"])
    harm(folder)
    with pytest.raises(SystemExit) as stopped:
        main([str(folder)])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_folder_and_pattern_are_named(adapter: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="is not there; a folder is needed"):
        read_adapter(tmp_path / "nowhere")
    whole = inspect_adapter(read_adapter(adapter.folder))
    with pytest.raises(AdapterError, match=r"is in no layer's name; there are model\.layers\.0"):
        select(whole, layers="fc")
    with pytest.raises(AdapterError, match="not a regular expression"):
        select(whole, layers="(")
