"""``ept-train`` from the command line to the files, on a tiny model and a described folder."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from ept import demo, predict, train
from ept.data import TaskData, load_tasks
from ept.export.cli import main as export_main
from ept.files import read_json, write_json
from ept.training import evaluate_tasks, load_trained, newest_checkpoint
from ept.training.options import RunSettings, build_parser, parse

PICTURES = ("loss.png", "expert_use.png", "task_embeddings.png")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, command: Callable) -> Path:
    """The output of one run."""
    output = tmp_path_factory.mktemp("runs") / "first"
    assert train.main(command(output)) == 0
    return output


def test_a_run_writes_adapter_metrics_and_pictures(finished: Path, tasks: list[TaskData]) -> None:
    assert {path.name for path in finished.iterdir()} == {
        "adapter",
        "checkpoints",
        "metrics.json",
        "pictures",
        "settings.json",
    }
    for name in PICTURES:
        with Image.open(finished / "pictures" / name) as picture:
            picture.verify()
            assert min(picture.size) > 300
    metrics = read_json(finished / "metrics.json")
    assert set(metrics) == {
        "format",
        "settings",
        "versions",
        "device",
        "parameters",
        "tasks",
        "mean",
        "history",
    }
    assert metrics["format"] == 1
    assert metrics["settings"]["kernel_sizes"] == [1, 2, 2]
    assert set(metrics["parameters"]) == {"seed", "kernels", "gates", "task embeddings", "other", "all"}
    assert {"python", "torch", "transformers", "peft"} <= set(metrics["versions"])
    assert list(metrics["tasks"]) == [task.spec.name for task in tasks]
    for task in tasks:
        entry = metrics["tasks"][task.spec.name]
        assert entry["kind"] == task.spec.kind
        assert entry["headline"] == task.spec.metrics[0]
        for stage in ("baseline", "before", "after"):
            assert all(isinstance(entry[stage][metric], float) for metric in task.spec.metrics)
    for stage, mean in metrics["mean"].items():
        headlines = [entry[stage][entry["headline"]] for entry in metrics["tasks"].values()]
        assert mean == pytest.approx(sum(headlines) / 3)
    assert any("contrastive_loss" in entry for entry in metrics["history"]) or len(metrics["history"]) > 0


def test_the_adapter_reloads_and_scores_the_same(finished: Path) -> None:
    model, tokenizer, specs = load_trained(finished)
    assert not model.training
    settings = read_json(finished / "settings.json")
    tasks = load_tasks(settings["data"], None)
    assert specs == [task.spec for task in tasks]
    found = evaluate_tasks(model, tokenizer, tasks, max_length=settings["max_length"])
    for name, entry in read_json(finished / "metrics.json")["tasks"].items():
        assert {metric: entry["after"][metric] for metric in found[name]} == found[name]


def test_the_demo_verifies_a_run(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--verify", "--output", str(finished)]) == 0
    shown = capsys.readouterr().out
    assert "largest difference 0.0e+00" in shown
    assert shown.count("unmerging restores them bit-identically: True") == 3
    output = tmp_path / "tampered"
    subprocess.run(["cp", "-r", str(finished), str(output)], check=True)
    metrics = read_json(output / "metrics.json")
    metrics["tasks"]["topic"]["after"]["accuracy"] += 0.01
    write_json(output / "metrics.json", metrics)
    assert demo.main(["--verify", "--output", str(output)]) == 1
    assert "FAILED reloaded adapter scores the same: largest difference 1.0e-02" in capsys.readouterr().out


def test_the_demo_asks_for_learning_on_every_task() -> None:
    stages = {"baseline": {"accuracy": 0.5}, "before": {"accuracy": 0.5}}
    tasks = {name: {"headline": "accuracy", **stages, "after": {"accuracy": 0.9}} for name in "ab"}
    console = Console(file=io.StringIO())
    assert demo._check_learning({"tasks": tasks}, console)
    tasks["b"]["after"] = {"accuracy": 0.52}
    assert not demo._check_learning({"tasks": tasks}, console)
    assert "FAILED b: accuracy 0.520, baseline 0.500" in console.file.getvalue()


def test_a_resumed_run_equals_an_uninterrupted_one(finished: Path, command: Callable, tmp_path: Path) -> None:
    output = tmp_path / "resumed"
    output.mkdir()
    for name in ("settings.json", "checkpoints/checkpoint-3"):
        subprocess.run(["cp", "-r", "--parents", name, str(output)], cwd=finished, check=True)
    broken = output / "checkpoints" / "checkpoint-5"  # as a run leaves it that is killed while writing
    broken.mkdir()
    (broken / "trainer_state.json").write_text('{"global_st')
    assert newest_checkpoint(output / "checkpoints").name == "checkpoint-3"
    assert train.main(command(output, "--resume")) == 0
    wanted, found = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (finished, output))
    assert wanted.keys() == found.keys()
    assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == []


def test_resuming_with_another_recipe_is_refused(
    finished: Path, command: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, message in (
        ({"lr": 0.02}, "argument --lr: 0.02 differs from 0.01 of the run to resume"),
        ({"tasks": "topic"}, "argument --tasks: ['topic'] differs from None of the run to resume"),
    ):
        with pytest.raises(SystemExit) as stop:
            train.main(command(finished, "--resume", **options))
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_an_earlier_run_is_replaced_only_on_request(
    finished: Path, command: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        train.main(command(finished))
    assert stop.value.code == 2
    assert "holds an earlier run; add --resume or --overwrite" in capsys.readouterr().err
    output = tmp_path / "again"
    subprocess.run(["cp", "-r", str(finished), str(output)], check=True)
    options = {"tasks": "topic", "max_steps": 1, "save_steps": 0}
    assert train.main(command(output, "--overwrite", **options)) == 0
    assert list(read_json(output / "metrics.json")["tasks"]) == ["topic"]
    assert [spec.name for spec in load_trained(output)[2]] == ["topic"]
    assert newest_checkpoint(output / "checkpoints") is None
    assert not (output / "pictures" / "task_embeddings.png").exists()  # one task has no map, and the old one is gone


@pytest.mark.parametrize("model", ["t5", "llama"])
def test_a_text_to_label_model_runs_too(source: Path, command: Callable, tmp_path: Path, model: str) -> None:
    options = {"model": source / model, "tasks": "topic,degree", "max_steps": 1, "eval_limit": 4, "save_steps": 0}
    assert train.main(command(tmp_path / model, **options)) == 0
    metrics = read_json(tmp_path / model / "metrics.json")
    assert set(metrics["tasks"]["topic"]["after"]) == {"accuracy", "unparseable"}
    trained, tokenizer, specs = load_trained(tmp_path / model)
    tasks = load_tasks(metrics["settings"]["data"], [spec.name for spec in specs])
    found = evaluate_tasks(trained, tokenizer, tasks, max_length=32, limit=4)
    assert found["topic"] == metrics["tasks"]["topic"]["after"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": "-1"}, "argument --lr: must be a number > 0, got '-1'"),
        ({"lr": "nan"}, "argument --lr: must be a number > 0, got 'nan'"),
        ({"kernel_lr_ratio": "0"}, "argument --kernel-lr-ratio: must be a number > 0, got '0'"),
        ({"warmup": "-0.1"}, "argument --warmup: must be a number >= 0"),
        ({"epochs": "0"}, "argument --epochs: must be a number > 0"),
        ({"max_steps": "0"}, "argument --max-steps: must be an integer >= 1, got '0'"),
        ({"batch_size": "2.5"}, "argument --batch-size: must be an integer >= 1, got '2.5'"),
        ({"max_length": "4"}, "argument --max-length: must be an integer >= 8, got '4'"),
        ({"r": "0"}, "argument --r: must be an integer >= 1, got '0'"),
        ({"kernel_sizes": "2,x"}, "argument --kernel-sizes: must be integers >= 1 separated by commas, got '2,x'"),
        ({"kernel_sizes": "2,0"}, "argument --kernel-sizes: must be integers >= 1"),
        (
            {"kernel_sizes": "400"},
            "argument --kernel-sizes: must name at least 2 experts, the number that --top-k mixes, got '400'; "
            "name more, or give a smaller --top-k",
        ),
        ({"top_k": "4"}, "argument --top-k: must be at most 3, the number of --kernel-sizes, got 4"),
        ({"dropout": "1"}, "argument --dropout: must be a number >= 0 and < 1, got '1'"),
        ({"task_similarity": "1"}, "argument --task-similarity: must be a number >= 0 and < 1, got '1'"),
        ({"task_batching": "both"}, "argument --task-batching: invalid choice: 'both'"),
        ({"init_seed": "ones"}, "argument --init-seed: invalid choice: 'ones'"),
        ({"tasks": "topic,,degree"}, "argument --tasks: must be names separated by commas"),
        ({"tasks": "topic,weather"}, "argument --data, --tasks or --columns: unknown task 'weather'"),
        (
            {"data": "/no/such/folder"},
            "argument --data, --tasks or --columns: data source '/no/such/folder' is not a directory",
        ),
        ({"model": "/no/such/model"}, "argument --model: "),
        ({"target_modules": "nothing"}, "argument --model, --tasks or --target-modules: "),
        ({"kernel_sizes": "1,2,64"}, "argument --model, --tasks or --target-modules: "),
        ({"output": None}, "the following arguments are required: --output"),
    ],
)
def test_bad_options_are_named_before_any_work(
    command: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict, message: str
) -> None:
    output = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        train.main(command(**{"output": output} | options))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_resuming_needs_a_checkpoint(command: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(command(tmp_path, "--resume"))
    assert "argument --resume: no complete checkpoint in" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main(command(tmp_path, "--resume", "--overwrite"))
    assert "argument --resume: not together with --overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda settings: settings | {"processes": 2}, "argument --resume: the run had 2 processes, this one has 1"),
        (lambda settings: [1], r"settings.json' holds no settings"),
        (lambda settings: None, r"settings.json' holds no settings"),
    ],
)
def test_resuming_needs_the_run_as_it_was(
    finished: Path,
    command: Callable,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict], object],
    message: str,
) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    settings = read_json(output / "settings.json")
    assert settings["processes"] == 1
    write_json(output / "settings.json", change(settings))
    with pytest.raises(SystemExit):
        train.main(command(output, "--resume"))
    assert message in capsys.readouterr().err


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def _flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[0] ^= 0xFF
    path.write_bytes(data)


def _unknown(path: Path) -> None:
    write_json(path, read_json(path) | {"peft_type": "NOPE"})


@pytest.mark.parametrize("spoil", [_truncated, _flipped, Path.unlink])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "ept_tasks.json"])
def test_a_damaged_adapter_is_named_at_every_door(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, spoil: Callable[[Path], None]
) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished / "adapter", output / "adapter")
    spoil(output / "adapter" / name)
    if name != "ept_tasks.json" or spoil is not Path.unlink:  # without it the folder is one of plain PEFT
        with pytest.raises(ValueError, match=re.escape(name)):
            load_trained(output)
    with pytest.raises(SystemExit):
        export_main(["deltas", str(output / "adapter"), str(tmp_path / "deltas")])
    assert "error: " in capsys.readouterr().err
    assert not (tmp_path / "deltas").exists()


def test_an_adapter_of_an_unknown_method_or_of_other_tasks_is_named(finished: Path, tmp_path: Path) -> None:
    for folder in ("method", "tasks"):
        shutil.copytree(finished / "adapter", tmp_path / folder / "adapter")
    _unknown(tmp_path / "method" / "adapter" / "adapter_config.json")
    with pytest.raises(ValueError, match=r"adapter_config\.json': peft_type is 'NOPE', which is no known method"):
        load_trained(tmp_path / "method")
    path = tmp_path / "tasks" / "adapter" / "ept_tasks.json"
    content = read_json(path)
    write_json(path, content | {"tasks": content["tasks"][::-1]})
    with pytest.raises(ValueError, match=r"ept_tasks\.json' holds the tasks \['degree', .*the adapter beside it"):
        load_trained(tmp_path / "tasks")


def test_an_output_that_is_a_file_is_refused(
    command: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        train.main(command(tmp_path / "file"))
    assert "is a file; a folder is needed" in capsys.readouterr().err


def test_the_parser_has_every_setting_and_its_default() -> None:
    parser = build_parser()
    assert parse(parser, ["--output", "x"]) == RunSettings(output="x")
    changed = parse(parser, ["--output", "x", "--no-alp-scaling", "--target-modules", "q,v", "--warmup", "500"])
    assert changed == RunSettings(output="x", alp_scaling=False, target_modules=("q", "v"), warmup=500.0)
    assert "peak learning rate (default: " in parser.format_help()


def test_a_folder_without_an_adapter_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no trained adapter"):
        load_trained(tmp_path)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "ept_tasks.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="is not of format 1"):
        load_trained(tmp_path)


def test_from_two_files_to_answers(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["poor", "fine", "wave", "cloud"]
    lines = [f"the {words[i % 4]} a {words[i // 4 % 4]},{words[i % 4]}" for i in range(64)]
    (tmp_path / "news.csv").write_text("headline,topic\n" + "\n".join(lines) + "\n")
    rows = [{"text": f"very {words[i % 4]} {words[i // 4 % 4]}", "score": i % 4 + i / 64} for i in range(64)]
    (tmp_path / "mood.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "run"
    data = ["--data", f"topic={tmp_path / 'news.csv'}", "--data", str(tmp_path / "mood.jsonl")]
    options = ["--max-steps", "2", "--batch-size", "4", "--save-steps", "1", "--output", str(out)]
    options += ["--model", str(source / "model")]
    assert train.main([*data, *options, "--columns", "mood=text:score"]) == 0
    said = capsys.readouterr().out
    assert "task 'topic': text 'headline', label 'topic' (4 classes: cloud, fine, poor, wave)" in said
    assert "task 'mood': text 'text', label 'score' (a number)" in said
    assert predict.main([str(out), "the poor cloud", "--task", "topic"]) == 0
    assert set(json.loads(capsys.readouterr().out)["scores"]) == set(words)
    assert (
        train.main([*data, *options, "--columns", "mood=text:score", "--save-steps", "1", "--resume", "--quiet"]) == 0
    )
    with pytest.raises(SystemExit):
        train.main([*options, "--data", str(tmp_path / "news.csv"), "--columns", "news=headline", "--overwrite"])
    assert "must be TASK=TEXT:LABEL" in capsys.readouterr().err


def test_settings_come_from_a_file_and_from_an_earlier_run(
    finished: Path, tmp_path: Path, command: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = build_parser()
    written = tmp_path / "run.yaml"
    written.write_text(
        "lr: 0.002\nkernel_sizes: [2, 4]\ntop_k: 1\nset: {routing: token}\ndata: [a.csv, b=c.jsonl]\n"
        "alp_scaling: false\nbf16: true\neval_steps: 5\n"
    )
    settings = parse(parser, ["--output", "x", "--config", str(written), "--lr", "0.5", "--data=sentiment"])
    assert (settings.lr, settings.kernel_sizes, settings.set) == (0.5, (2, 4), {"routing": "token"})
    assert (settings.data, settings.alp_scaling, settings.bf16) == ("sentiment", False, True)
    assert settings.arguments()["eval_strategy"] == "steps"
    assert parse(parser, ["--output", "x", f"--config={written}"]).data == ("a.csv", "b=c.jsonl")

    earlier = parse(parser, command(finished))
    again = parse(parser, ["--config", str(finished / "settings.json"), "--output", str(tmp_path)])
    assert replace(again, output=earlier.output) == earlier

    for content, message in [
        ("lr: [", "cannot be read"),
        ("- lr", "must hold settings by name"),
        ("learning_rate: 1", "has no setting 'learning_rate'; allowed: output, method"),
        ("lr: -1", "argument --lr: must be a number > 0, got '-1'"),
    ]:
        written.write_text(content)
        with pytest.raises(SystemExit):
            parse(parser, ["--output", "x", "--config", str(written)])
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_an_interrupted_run_says_how_to_go_on(
    tmp_path: Path, command: Callable, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    arguments = command(tmp_path / "run", save_steps=1, gradient_accumulation_steps=2, lr_scheduler="cosine")
    with monkeypatch.context() as patch:
        patch.setattr("ept.training.run.write_metrics", stop)
        with pytest.raises(SystemExit) as stopped:
            train.main(arguments)
    assert stopped.value.code == 130
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("ept-train: interrupted; to go on: ept-train --")
    assert train.main(shlex.split(told.partition("to go on: ept-train ")[2])) == 0
    assert (tmp_path / "run" / "metrics.json").is_file()
