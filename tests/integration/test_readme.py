"""The README's Python blocks, run as they stand, with tiny random models in place of the hub's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers

from .conftest import CASES

README = Path(__file__).parents[2] / "README.md"


def _blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        transformers.AutoModelForSeq2SeqLM, "from_pretrained", lambda name: CASES["t5"].build(), raising=True
    )
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda name: CASES["llama"].build(), raising=True
    )
    ids = torch.randint(3, 64, (2, 6))
    namespace = {"input_ids": ids, "labels": ids.clone()}
    blocks = _blocks()
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
    assert namespace["y"].shape == (16, 128, 768)
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()
    assert type(namespace["plain"]).__name__ == "LlamaForCausalLM"


def test_option_table_gives_the_real_defaults() -> None:
    import ept

    rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", README.read_text(), flags=re.MULTILINE))
    config = ept.EPTConfig()
    for name in (
        "r",
        "lora_alpha",
        "kernel_sizes",
        "top_k",
        "lora_dropout",
        "alp_scaling",
        "task_embedding_dim",
        "task_similarity",
    ):
        assert str(getattr(config, name)) == rows[name], name


def test_the_comparison_is_that_of_the_recorded_runs() -> None:
    summary = json.loads((README.parent / "benchmarks" / "results" / "quality" / "summary.json").read_text())
    text = (
        README.read_text().partition("`python benchmarks/quality.py --data FOLDER` compares")[2].partition("\n## ")[0]
    )
    tasks = len(summary["methods"]["ept"]["scores"])

    def row(title: str) -> list[str]:
        (line,) = re.findall(rf"^\| \**{re.escape(title)}.* ± .*\|$", text, flags=re.MULTILINE)
        return [cell.strip() for cell in line.split("|")[1:-1]]

    def score(found: dict) -> str:
        return f"{found['mean']:.3f} ± {found['standard_error']:.3f}"

    titles = {"lora": "PEFT LoRA", "moelora": "MOELoRA", "more": "MoRE", "mixlora": "MixLoRA", "dcft": "DCFT"}
    titles |= {"tucka": "TuckA", "ept": "EPT"}
    for method, found in summary["methods"].items():
        _, rate, trained, mean, *_ = row(titles[method])
        assert (float(rate), mean) == (found["lr"], score(found)), method
        assert trained == f"{found['parameters'] / tasks:,.0f}", method
    titles = {
        "no-top-k": "every task mixes",
        "zero-init-seed": "B starts at zero",
        "no-contrastive-loss": "no contrastive loss",
        "all-2": "eight experts of scale 2",
        "no-alp-scaling": "no dimension-aware scale",
        "all-8": "eight experts of scale 8",
    }
    assert {name: row(titles[name])[1] for name in titles} == {
        name: score(found) for name, found in summary["ablations"].items()
    }
