"""``ept-export`` on what ``ept-train`` wrote: encoder and head are used without ``ept``, as ``docs/export.md`` says."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from export_testing import without_ept
from pyramid_testing import assert_matches
from transformers import AutoModel

import ept
from ept import train
from ept.export import cli
from ept.files import read_json
from ept.training import load_trained

DOCUMENT = Path(__file__).parents[2] / "docs" / "export.md"
TEXTS = ["the boat", "very poor the wind"]


@pytest.fixture(scope="module")
def finished(command: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run") / "run"
    assert train.main(command(output)) == 0
    return output


@pytest.fixture(scope="module")
def served(finished: Path) -> tuple[peft.PeftModel, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The trained model, a batch, and its logits under every task."""
    model, tokenizer, specs = load_trained(finished)
    batch = dict(tokenizer(TEXTS, return_tensors="pt", padding=True))
    with torch.no_grad():
        logits = {spec.name: model(**batch, task_ids=i).logits[:, : spec.num_labels] for i, spec in enumerate(specs)}
    return model, batch, logits


def _documented() -> str:
    """The document's recipe for an encoder with a head beside it."""
    return next(
        block for block in re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.S) if "head.json" in block
    )


@pytest.mark.parametrize("task", ["polarity", "topic", "2"])
def test_merged_encoder_and_head_give_the_tasks_logits(
    finished: Path, served, task: str, tmp_path: Path, capsys
) -> None:
    _, batch, logits = served
    folder = tmp_path / "merged"
    assert cli.main(["merged", str(finished), str(folder), "--task", task]) == 0
    assert str(folder) in capsys.readouterr().out
    name = "degree" if task == "2" else task
    description = read_json(folder / "head.json")
    assert description["task"] == name and description["pooling"] == "masked mean"
    assert ("label_range" in description) == (name == "degree") and (folder / "tokenizer_config.json").exists()
    script = f"folder = {str(folder)!r}\n" + _documented() + "\nresult = lambda batch: logits_of(**batch)"
    assert_matches(without_ept(script, batch, tmp_path), logits[name], 1e-5)


def test_lora_of_the_encoder(finished: Path, served, source: Path, tmp_path: Path, capsys) -> None:
    model, batch, _ = served
    folder = tmp_path / "lora"
    assert cli.main(["lora", str(finished), str(folder), "--task", "topic"]) == 0
    assert re.search(r"LoRA of rank \d+ and [\d,]+ parameters, relative error 0\.0e\+00", capsys.readouterr().out)
    script = f"""
from peft import AutoPeftModelForFeatureExtraction
def result(batch):
    return AutoPeftModelForFeatureExtraction.from_pretrained({str(folder)!r}).eval()(**batch).last_hidden_state
"""
    with torch.no_grad(), ept.use_tasks("topic"):
        merged = AutoModel.from_pretrained(ept.export_merged(model, "topic", tmp_path / "merged")).eval()
        expected = merged(**batch).last_hidden_state
    assert_matches(without_ept(script, batch, tmp_path), expected, 1e-5)
    assert (folder / "head.safetensors").exists()


def test_deltas_of_the_encoder_carry_the_heads(finished: Path, served, source: Path, tmp_path: Path) -> None:
    _, batch, logits = served
    assert cli.main(["deltas", str(finished), str(tmp_path / "deltas")]) == 0
    deltas = ept.load_deltas(tmp_path / "deltas")
    assert set(deltas.tasks) == set(logits)
    for task, expected in logits.items():
        model = ept.apply_delta(
            AutoModel.from_pretrained(source / "model", add_pooling_layer=False).eval(), deltas, task
        )
        head, description = deltas.head(task)
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        assert description["task"] == task
        assert_matches(pooled @ head["weight"].T + head["bias"], expected, 1e-5)


def test_an_adapter_of_peft(source: Path, tmp_path: Path) -> None:
    """Its base is named by the adapter's config, or by ``--base``."""
    from transformers import AutoModelForCausalLM

    config = ept.EPTConfig(r=2, task_names=["a", "7"], kernel_sizes=(1, 2), target_modules="all-linear")
    config.task_type = "CAUSAL_LM"
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(source / "llama"), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "kernels." in name:
                parameter.normal_()
    model.save_pretrained(tmp_path / "adapter")
    batch = {"input_ids": torch.tensor([[5, 7, 9, 6]])}
    arguments = ["merged", str(tmp_path / "adapter"), str(tmp_path / "merged"), "--task", "7"]
    assert cli.main([*arguments, "--base", str(source / "llama")]) == 0
    with torch.no_grad():
        expected = model(**batch, task_ids="7").logits
        assert_matches(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(**batch).logits, expected, 1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merged", "{run}", "{out}"], "argument --task: must be given"),
        (["lora", "{run}", "{out}", "--task", "absent"], "unknown task 'absent'"),
        (["lora", "{run}", "{out}", "--task", "topic", "--rank", "0"], "argument --rank: must be an integer >= 1"),
        (["deltas", "{out}", "{out}"], "holds no adapter_config.json"),
        (["deltas", "{run}", "{run}"], "is not empty; --overwrite"),
        (["deltas", "{run}", "{out}", "--base", "x"], "names its own"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, finished: Path, tmp_path: Path, capsys) -> None:
    filled = [argument.format(run=finished, out=tmp_path / "out") for argument in arguments]
    with pytest.raises(SystemExit) as error:
        cli.main(filled)
    assert error.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
