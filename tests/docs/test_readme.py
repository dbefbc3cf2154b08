"""Every code block of the README, run as it stands: Python, the commands, and what installs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from ept import train
from ept.export.cli import main as export_main
from ept.inspecting.cli import main as inspect_main
from ept.predict import main as predict_main

from .conftest import ROOT, VOCABULARY, blocks

README = ROOT / "README.md"
COMMANDS = {
    "ept-train": train.main,
    "ept-predict": predict_main,
    "ept-inspect": inspect_main,
    "ept-export": export_main,
}


def _lines(block: str) -> list[list[str]]:
    return [shlex.split(line, comments=True) for line in block.splitlines() if line.strip()]


def test_every_block_is_of_a_kind_that_these_tests_run() -> None:
    languages = re.findall(r"^```(\w*)$", README.read_text(), flags=re.MULTILINE)
    assert languages == ["bash", "", "python", "", "python", "", "bash", "", "python", ""]


def test_layer_and_model(tiny_models: None, tmp_path: Path) -> None:
    layer, model, _ = blocks(README, "python")
    ids = torch.randint(3, VOCABULARY, (2, 6))
    namespace = {"input_ids": ids, "labels": ids.clone()}
    for block in (layer, model):
        exec(compile(block, str(README), "exec"), namespace)
    assert namespace["y"].shape == (16, 128, 768)
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()
    assert namespace["tokens"].shape[0] == 2
    assert type(namespace["plain"]).__name__ == "T5ForConditionalGeneration"


def test_training_inspecting_exporting_and_predicting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two steps in place of 300."""
    monkeypatch.chdir(tmp_path)
    _, commands = blocks(README, "bash")
    assert commands.count("--max-steps 300") == 1
    commands = commands.replace("--max-steps 300", "--max-steps 2 --batch-size 4 --eval-limit 8")
    for name, *arguments in _lines(commands):
        assert COMMANDS[name](arguments) == 0, (name, arguments)
    assert "movies" in (tmp_path / "runs/mine/page.html").read_text()
    assert (tmp_path / "runs/movies/model.safetensors").is_file()
    assert (tmp_path / "runs/movies-lora/adapter_model.safetensors").is_file()
    namespace: dict = {}
    exec(compile(blocks(README, "python")[2], str(README), "exec"), namespace)
    loaded, (movie, tweet) = namespace["loaded"], namespace["answers"]
    assert set(movie) == {"task", "label", "score", "scores"}
    assert set(tweet) == {"task", "value"}
    (found,) = namespace["pipe"]("a joy from start to finish")
    assert found["label"] == movie["label"]

    (without,) = blocks(ROOT / "docs" / "export.md", "python")
    alone = {"folder": "runs/movies"}
    exec(compile(without, "export.md", "exec"), alone)
    with torch.no_grad():
        logits = alone["logits_of"](**loaded.tokenizer("a joy from start to finish", return_tensors="pt"))
    shares = torch.tensor(list(movie["scores"].values()))
    torch.testing.assert_close(logits[0].softmax(0), shares, rtol=1e-4, atol=1e-4)


def test_what_installs_is_declared() -> None:
    """Tests cannot install: what the first block names must exist."""
    declared = (ROOT / "pyproject.toml").read_text()
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for command in _lines(blocks(README, "bash")[0]):
        if command[0] == "make":
            assert command[1] in targets
        else:
            assert command[:2] == ["pip", "install"]
            extra = re.fullmatch(r"\.(?:\[(\w+)\])?", command[2])
            assert extra, command
            assert extra[1] is None or f"\n{extra[1]} = [" in declared


def test_it_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 140
