"""The serving benchmark: what it times is right, and it refuses to time what is not."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import serving
import torch
import transformers
from torch import nn

import ept


def tiny() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return transformers.BertModel(transformers.BertConfig(vocab_size=40, **sizes)).eval()


def test_merged_frozen_and_mixed_are_what_they_say() -> None:
    base, ids = tiny(), torch.randint(40, (4, 5))
    with torch.inference_mode():
        candidates = serving.model_candidates(base, ids, (1, 2))
        results = {name: timed.call()[0] for name, timed in candidates.items() if "tasks" not in name}
        mixed = {name: timed.call() for name, timed in candidates.items() if "tasks" in name}
    assert set(mixed) == {"1 tasks", "2 tasks"}
    torch.testing.assert_close(results["frozen"], base(ids)[0])
    torch.testing.assert_close(results["merged"], results["one id"], atol=1e-4, rtol=1e-4)
    assert torch.equal(mixed["1 tasks"], results["one id"])
    torch.testing.assert_close(mixed["2 tasks"][0], results["one id"][0], atol=1e-5, rtol=1e-4)
    outputs = [results["frozen"], results["one id"], results["token"], mixed["2 tasks"]]
    assert all(not torch.allclose(a, b, atol=1e-3) for i, a in enumerate(outputs) for b in outputs[:i])


def test_folding_anew_changes_nothing() -> None:
    with torch.inference_mode():
        candidates = serving.layer_candidates(16, torch.randn(8, 3, 16), (1, 8))
        results = {name: timed.call() for name, timed in candidates.items()}
    torch.testing.assert_close(results["8 tasks, anew"], results["8 tasks"])
    torch.testing.assert_close(results["one id, anew"], results["one id"])
    torch.testing.assert_close(results["merged"], results["one id"], atol=1e-5, rtol=1e-5)


def test_a_wrong_row_gets_no_speed() -> None:
    layer = ept.EPTLinear(16, 16, config=ept.EPTConfig(num_tasks=2))
    with pytest.raises(RuntimeError, match="row 0 of a batch with 2 tasks is off"):
        serving.check_rows(lambda x, ids: layer(x, ids) + len(x), torch.randn(4, 16), torch.tensor([0, 1, 0, 1]))


def test_the_record_holds_every_candidate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "serving.json"
    monkeypatch.setattr(
        sys, "argv", ["serving", "--cases", "small", "--rounds", "3", "--device", "cpu", "--json", str(path)]
    )
    serving.main()
    record = json.loads(path.read_text())
    assert record["backend"] in ("cpu", "torch")
    names = ["frozen", "merged", "one id", "1 tasks", "2 tasks", "8 tasks", "one id, anew", "8 tasks, anew", "token"]
    assert list(record["cases"]["small"]["candidates"]) == names
    assert record["cases"]["small"]["candidates"]["1 tasks"]["over_one_task"] == 1
    assert "8 x 1 tokens" in capsys.readouterr().out
