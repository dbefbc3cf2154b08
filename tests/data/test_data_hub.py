"""Hub datasets, with the hub replaced by what it would return or by a local directory."""

from __future__ import annotations

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from ept.data import hub, load_tasks


def _rows(texts: dict[str, list[str]], label, values) -> Dataset:
    features = {**{name: Value("string") for name in texts}, "label": label, "idx": Value("int32")}
    return Dataset.from_dict({**texts, "label": values, "idx": list(range(len(values)))}, features=Features(features))


@pytest.fixture
def glue(monkeypatch):
    """GLUE in miniature; records the calls."""
    entailment = ClassLabel(names=["entailment", "neutral", "contradiction"])
    accepted = ClassLabel(names=["unacceptable", "acceptable"])
    pair = {"premise": ["p", "q", "r"], "hypothesis": ["h", "i", "j"]}
    sentences = {"sentence1": ["a", "b"], "sentence2": ["c", "d"]}
    content = {
        "mnli": DatasetDict(
            train=_rows(pair, entailment, [0, 1, 2]),
            validation_matched=_rows(pair, entailment, [2, 1, 0]),
            validation_mismatched=_rows(pair, entailment, [1, 1, 1]),
        ),
        "stsb": DatasetDict(
            train=_rows(sentences, Value("float32"), [0.0, 5.0]),
            validation=_rows(sentences, Value("float32"), [2.5, 1.0]),
        ),
        "cola": DatasetDict(
            train=_rows({"sentence": ["a", "b"]}, accepted, [0, 1]),
            validation=_rows({"sentence": ["c", "d"]}, accepted, [1, 1]),
            test=_rows({"sentence": ["e", "f"]}, accepted, [-1, -1]),
        ),
    }
    calls = []

    def load(identifier, configuration, **options):
        calls.append((identifier, configuration, options))
        return content[configuration]

    monkeypatch.setattr(hub.datasets, "load_dataset", load)
    return calls


def test_glue(glue):
    mnli, stsb, cola = load_tasks("hub:nyu-mll/glue@main", ["mnli", "stsb", "cola"], cache_dir="cache")
    assert mnli.spec.label_names == ("entailment", "neutral", "contradiction")
    assert mnli.train[0] == {"text": "p", "text_pair": "h", "label": 0}
    assert mnli.validation["label"][:] == [2, 1, 0]
    assert stsb.spec.kind == "regression" and stsb.spec.label_range == (0.0, 5.0)
    assert cola.spec.metrics == ("matthews",) and cola.test is None
    assert glue[0] == ("nyu-mll/glue", "mnli", {"revision": "main", "cache_dir": "cache"})


def test_unknown_glue_task_is_refused_before_any_download(glue, raises):
    raises(lambda: load_tasks("hub:glue", ["cola", "wnli2"]), "'wnli2'", "mnli, qqp, qnli")
    assert glue == []


def test_out_of_reach(monkeypatch, raises):
    def unreachable(*_, **__):
        raise ConnectionError("no route\nsecond line")

    monkeypatch.setattr(hub.datasets, "load_dataset", unreachable)
    monkeypatch.setattr(hub.datasets, "get_dataset_config_names", unreachable)
    for source in ("hub:glue", "hub:someone/else"):
        raises(lambda source=source: load_tasks(source), "ConnectionError: no route", "--data FOLDER", "sentiment")


def _generic(monkeypatch, configurations, content) -> None:
    monkeypatch.setattr(hub.datasets, "get_dataset_config_names", lambda *_, **__: configurations)
    monkeypatch.setattr(hub.datasets, "load_dataset", lambda *_, **__: content)


def test_any_classification_dataset(monkeypatch, raises):
    topic = ClassLabel(names=["world", "sports"])
    content = DatasetDict(train=_rows({"text": ["a"]}, topic, [0]), test=_rows({"text": ["b"]}, topic, [1]))
    _generic(monkeypatch, ["default"], content)
    (task,) = load_tasks("hub:someone/news.v1")
    assert task.spec.name == "news_v1" and task.spec.label_names == ("world", "sports")
    assert task.validation[0] == {"text": "b", "text_pair": None, "label": 1} and task.test is None
    _generic(monkeypatch, ["x", "y"], content)
    assert [task.spec.name for task in load_tasks("hub:someone/news", ["y", "x"])] == ["y", "x"]
    raises(lambda: load_tasks("hub:someone/news", ["z"]), "'z'", "x, y")


def test_datasets_of_another_shape(monkeypatch, raises):
    label = ClassLabel(names=["no", "yes"])
    text = _rows({"text": ["a"]}, label, [0])
    hidden = _rows({"text": ["a"]}, label, [-1])
    for content, parts in (
        (DatasetDict(test=text), ["no split 'train'", "test"]),
        (DatasetDict(train=text), ["no labelled split", "there is: train"]),
        (DatasetDict(train=text, validation=hidden), ["no labelled split"]),
        (DatasetDict(train=text.remove_columns("label")), ["one ClassLabel column", "index.json"]),
        (DatasetDict(train=_rows({"a": ["a"], "b": ["b"], "c": ["c"]}, label, [0])), ["one or two string columns"]),
    ):
        _generic(monkeypatch, ["default"], content)
        raises(lambda: load_tasks("hub:someone/thing"), "'thing'", *parts)


def test_local_directory(tmp_path):
    label = ClassLabel(names=["no", "yes"])
    for split in ("train", "validation"):
        path = tmp_path / "questions" / "data" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        _rows({"text": ["a", "b"]}, label, [0, 1]).to_parquet(str(path))
    (task,) = load_tasks(f"hub:{tmp_path / 'questions'}", cache_dir=tmp_path / "cache")
    assert task.spec.name == "questions" and task.spec.label_names == ("no", "yes")
    assert task.validation["text"][:] == ["a", "b"]
