"""The pages of ``docs/``: their code, their links, and the defaults that they state."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import shlex
from pathlib import Path

import peft
import pytest
import torch
import transformers
from datasets import Dataset

import ept
from ept.export.cli import build_parser as export_parser
from ept.inspecting.cli import build_parser as inspect_parser
from ept.predict import build_parser as predict_parser
from ept.training.options import build_parser as train_parser

from .conftest import PAGES, ROOT, VOCABULARY, blocks

FROM_LORA = ROOT / "docs" / "from-lora.md"
PARSERS = {
    "ept-train": train_parser().parse_args,
    "ept-predict": predict_parser().parse_intermixed_args,
    "ept-inspect": inspect_parser().parse_args,
    "ept-export": export_parser().parse_args,
}

page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


# ---- code


def _side(diff: str, sign: str) -> str:
    """One of the two scripts that a diff holds."""
    return "".join(line[1:] for line in diff.splitlines(keepends=True) if line[:1] in (" ", "\n", sign))


def _rows(number: int, **more: object) -> list[dict[str, object]]:
    ids = torch.randint(3, VOCABULARY, (number, 6)).tolist()
    return [{"input_ids": row, "labels": row, **more} for row in ids]


def _batch(**more: object) -> dict[str, object]:
    ids = torch.randint(3, VOCABULARY, (2, 6))
    return {"input_ids": ids, "labels": ids.clone(), **more}


def _train(model: torch.nn.Module, loader: list[dict]) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for batch in loader:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("sign", ["-", "+"], ids=["lora", "ept"])
@pytest.mark.parametrize("number", range(3))
def test_both_scripts_of_every_block_run(number: int, sign: str, tiny_models: None, tmp_path: Path) -> None:
    ours = sign == "+"
    tasks = {"task_ids": torch.tensor([0, 1])} if ours else {}
    namespace = {
        "loader": torch.utils.data.DataLoader([_batch(**tasks) for _ in range(3)], batch_size=None),
        "rows": Dataset.from_list([{**row, **({"task_ids": i % 2} if ours else {})} for i, row in enumerate(_rows(8))]),
        "loaders": {name: [_batch()] for name in ("arc", "boolq")},
        "mixed_loader": [_batch(task_ids=["arc", "boolq"])],
        "train": _train,
        "ids": torch.randint(3, VOCABULARY, (2, 6)),
    }
    script = _side(blocks(FROM_LORA, "diff")[number], sign)
    exec(compile(script, str(FROM_LORA), "exec"), namespace)
    assert list(tmp_path.glob("out/**/adapter_model.safetensors"))
    if "logits" in script:
        assert namespace["logits"].shape == (2, 6, VOCABULARY)


def test_the_data_folder_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = blocks(ROOT / "docs" / "data.md", "python")
    namespace: dict = {}
    exec(compile(block, "data.md", "exec"), namespace)
    assert namespace["task"].train[0]["text"] == "a joy"


def _run(name: str, namespace: dict) -> dict:
    """All Python blocks of a page, one after the other."""
    for block in blocks(ROOT / "docs" / name, "python"):
        exec(compile(block, name, "exec"), namespace)
    return namespace


def _adapted(names: list[str]) -> peft.PeftModel:
    return peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained("tiny"), _config(names))


def _config(names: list[str]) -> ept.EPTConfig:
    return ept.EPTConfig(task_names=names, target_modules="all-linear", task_type="CAUSAL_LM")


def test_tasks(tiny_models: None) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained("tiny")
    batches = [_batch(task_ids=["tweets", "movies"]) for _ in range(2)]
    found = _run("tasks.md", {"base": base, "batch": _batch(), "batches": batches, "torch": torch})
    assert found["weights"].shape == (2, 2)
    assert found["task"] == 2


def test_serving(tiny_models: None) -> None:
    model = _adapted(["mnli", "cola", "sst2"])
    ids = torch.randint(3, VOCABULARY, (3, 6))
    base = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
        )
    )
    given = {"model": model, "base": base, "ids": ids, "mask": torch.ones_like(ids)}
    found = _run("serving.md", {**given, "torch": torch, "ept": ept, "get_peft_model": peft.get_peft_model})
    with pytest.raises(ValueError, match="merge"):
        found["model"].merge_adapter()


def test_rows(tiny_models: None) -> None:
    model = _adapted(["a", "b"]).eval()
    rows = [{"input_ids": torch.randint(3, VOCABULARY, (length,)).tolist()} for length in (3, 5)]
    ids_of_tokens = torch.tensor([[0] * 3 + [1] * 5])
    given = {"model": model, "rows": rows, "task_ids": [0, 1], "ids_of_tokens": ids_of_tokens}
    found = _run("rows.md", {**given, "ept": ept, "index": torch.tensor([1, 0]), "ends": torch.tensor([0, 3, 8])})
    assert found["batch"]["input_ids"].shape == (1, 8)


def test_pyramids(tiny_models: None) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained("tiny")
    given = {"base": base, "batches": [_batch(task_ids=[0, 0]) for _ in range(4)], "targets": ["q_proj", "v_proj"]}
    found = _run("pyramids.md", {**given, "ept": ept})
    assert isinstance(found["config"], ept.EPTConfig)


@page
def test_python_blocks_name_what_exists(page: Path) -> None:
    """Blocks of other pages continue a reader's own program: their syntax, and every name of this package."""
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("ept", "ept_kernels"):
                module = importlib.import_module(node.module)
                for name in node.names:
                    assert hasattr(module, name.name), f"{node.module}.{name.name}"
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ept":
                assert hasattr(ept, node.attr) or importlib.import_module(f"ept.{node.attr}"), node.attr


@page
def test_names_in_the_text_exist(page: Path) -> None:
    """``ept.name`` between backquotes; modules, too."""
    for path in re.findall(r"`((?:ept|ept_kernels)(?:\.\w+)+)[(`]", page.read_text()):
        if path.endswith((".py", ".md")):
            continue
        found: object = importlib.import_module(path.split(".")[0])
        for depth, name in enumerate(path.split(".")[1:], 2):
            if not hasattr(found, name):
                found = importlib.import_module(".".join(path.split(".")[:depth]))
            else:
                found = getattr(found, name)


@page
def test_commands_are_understood(page: Path, capsys: pytest.CaptureFixture) -> None:
    commands = [
        shlex.split(line, comments=True)
        for block in blocks(page, "bash")
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith(tuple(PARSERS))
    ]
    for name, *arguments in commands:
        PARSERS[name](arguments)


@page
def test_files_that_are_named_exist(page: Path) -> None:
    """Paths of this repository between backquotes."""
    folders = "ept|ept_kernels|csrc|benchmarks|tests|docs|requirements"
    for path in re.findall(rf"`(?:python |pytest )?((?:{folders})/[\w./-]+)", page.read_text()):
        assert (ROOT / path).exists(), path


# ---- links


def _anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@page
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT), link
        assert target.is_file(), link
        if page.parent == ROOT / "docs":
            assert target.is_relative_to(ROOT / "docs"), f"{link}: the site holds docs/ alone"
        assert not anchor or anchor in _anchors(target), link


# ---- defaults


def test_the_options_are_those_of_the_config() -> None:
    table = (ROOT / "docs" / "config.md").read_text().partition("## `EPTConfig`")[2].partition("\n## ")[0]
    stated = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", table, flags=re.MULTILINE))
    config = ept.EPTConfig()
    assert {name: str(getattr(config, name)) for name in stated} == stated
    inherited = {field.name for field in dataclasses.fields(peft.PeftConfig)}
    fields = {field.name for field in dataclasses.fields(config)} - inherited
    assert fields - set(stated) <= {"target_parameters", "layer_replication"}


# ---- the reference


def test_the_reference_holds_every_public_name() -> None:
    listed = re.findall(r"^::: ept\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), flags=re.MULTILINE)
    assert sorted([*listed, "__version__"]) == sorted([*ept.__all__, "data", "training"])
