"""The default tasks, and the archive they come from."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest

from ept.data import load_tasks, metrics, sentiment


def test_four_tasks(sentiment_cache):
    tasks = {task.spec.name: task for task in load_tasks()}
    rows = {name: (len(task.train), len(task.validation)) for name, task in tasks.items()}
    assert rows == {"tweets": (3597, 603), "movies": (8528, 1515), "products": (3139, 568), "editorials": (4310, 880)}
    assert {name: task.spec.num_labels for name, task in tasks.items()} == {
        "tweets": 1,
        "movies": 2,
        "products": 3,
        "editorials": 1,
    }
    for task in tasks.values():
        labels = np.array(task.validation["label"])
        score = metrics.baseline(task.spec, np.array(task.train["label"]), labels)[task.spec.metrics[0]]
        assert score <= 0.55, f"{task.spec.name}: a constant answer scores {score}"


def test_nothing_leaks_into_validation(sentiment_cache):
    for task in load_tasks():
        train = {sentiment._key(text) for text in task.train["text"]}
        assert not train & {sentiment._key(text) for text in task.validation["text"]}


def test_loading_again_gives_the_same_rows(sentiment_cache):
    first, second = (load_tasks("sentiment", ["products"])[0] for _ in range(2))
    assert first.train.to_dict() == second.train.to_dict()


def test_unknown_task(raises):
    raises(lambda: load_tasks("sentiment", ["tweet"]), "'tweet'", "tweets, movies, products, editorials")


def test_labels_of_a_valence():
    assert [sentiment._polarity(v) for v in (-3.0, -0.5, 0.0, 0.5, 0.6)] == [0, None, None, None, 1]
    assert [sentiment._three_way(v) for v in (-0.6, -0.5, 0.0, 0.5, 0.6)] == [0, 1, 1, 1, 2]


def test_key_ignores_case_and_punctuation():
    assert sentiment._key("Today SUX!!!") == sentiment._key("today, sux") == "todaysux"
    assert sentiment._key(":-)") == ":-)"


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.REGTYPE])
def test_odd_archive_members_are_refused(raises, kind):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        member = tarfile.TarInfo("member")
        member.type, member.linkname = kind, "elsewhere"
        if kind == tarfile.REGTYPE:
            member.size = sentiment._LIMIT_BYTES + 1
        tar.addfile(member, io.BytesIO(bytes(member.size)))
    with tarfile.open(fileobj=io.BytesIO(content.getvalue())) as tar:
        raises(lambda: sentiment._read_member(tar, "member"), "'member'", "plain file")


def test_no_network_names_the_alternatives_and_leaves_nothing(tmp_path, monkeypatch, raises):
    monkeypatch.setattr(sentiment, "_run", lambda command: "ERROR: no matching distribution")
    raises(
        lambda: load_tasks(cache_dir=tmp_path / "new"),
        "no matching distribution",
        sentiment.ARCHIVE,
        str(tmp_path / "new"),
        "--data FOLDER",
        "--data hub:ID",
    )
    assert list((tmp_path / "new").iterdir()) == []


def test_second_attempt_brings_its_own_setuptools(tmp_path, monkeypatch):
    commands = []

    def run(command):
        commands.append(command)
        if "--no-build-isolation" not in command:
            (Path(command[command.index("-d") + 1]) / sentiment.ARCHIVE).write_bytes(b"content")
        return "ERROR: setuptools"

    monkeypatch.setattr(sentiment, "_run", run)
    monkeypatch.setattr(sentiment.importlib.util, "find_spec", lambda name: object())
    sentiment._fetch(tmp_path / sentiment.ARCHIVE)
    assert ["--no-build-isolation" in command for command in commands] == [True, False]
    assert [path.name for path in tmp_path.iterdir()] == [sentiment.ARCHIVE]


def test_without_pip(tmp_path, monkeypatch, raises):
    monkeypatch.setattr(sentiment.importlib.util, "find_spec", lambda name: None)
    raises(lambda: load_tasks(cache_dir=tmp_path), "has no pip", "ensurepip")


def test_pip_that_hangs(monkeypatch):
    def hang(command, **_):
        raise subprocess.TimeoutExpired(command, 1)

    monkeypatch.setattr(sentiment.subprocess, "run", hang)
    assert "did not finish" in sentiment._run(["pip"])


def test_damaged_archive(tmp_path, raises):
    (tmp_path / sentiment.ARCHIVE).write_bytes(b"half")
    raises(lambda: load_tasks(cache_dir=tmp_path), "sha256", "delete it")
    assert (tmp_path / sentiment.ARCHIVE).read_bytes() == b"half"


def test_unusable_cache_folder(tmp_path, raises):
    (tmp_path / "file").write_text("")
    raises(lambda: load_tasks(cache_dir=tmp_path / "file" / "cache"), "cache folder", "EPT_CACHE")


def test_cache_folder_of_each_platform(monkeypatch):
    monkeypatch.setenv("EPT_CACHE", "/somewhere")
    assert sentiment.default_cache_dir() == Path("/somewhere")
    monkeypatch.delenv("EPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("LOCALAPPDATA", "/local")
    for platform, expected in (
        ("linux", Path("/xdg/ept")),
        ("darwin", Path.home() / "Library/Caches/ept"),
        ("win32", Path("/local/ept")),
    ):
        monkeypatch.setattr(sentiment.sys, "platform", platform)
        assert sentiment.default_cache_dir() == expected
