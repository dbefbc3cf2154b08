"""Folders described by an index: what is read, and every way in which they can be wrong."""

from __future__ import annotations

import hashlib
import math
import os

import pyarrow as pa
import pytest

from ept.data import load_tasks


def test_columns_and_specs(folder):
    folder.classification()
    folder.regression()
    folder.multiple_choice()
    polarity, likeness, quiz = folder.load()
    assert [task.spec.name for task in (polarity, likeness, quiz)] == ["polarity", "likeness", "quiz"]
    assert polarity.train[0] == {"text": "good", "text_pair": None, "label": 1}
    assert polarity.spec.metrics == ("accuracy", "f1") and polarity.spec.num_labels == 2
    assert likeness.train[1] == {"text": "y", "text_pair": "q", "label": 1.5}
    assert likeness.spec.label_range == (0.0, 5.0) and likeness.spec.num_labels == 1
    assert quiz.test[1] == {"text": "1+1?", "text_pair": None, "label": 2, "choices": ["1", "3", "2"]}
    assert str(polarity.train.features["label"].dtype) == "int64"
    assert str(likeness.train.features["label"].dtype) == "float64"


def test_selection_keeps_the_order_asked_for(folder):
    folder.classification("first")
    folder.classification("second")
    assert [task.spec.name for task in folder.load(["second", "first"])] == ["second", "first"]


def test_test_split_is_optional(folder):
    del folder.classification()["splits"]["test"]
    assert folder.load()[0].test is None


@pytest.mark.parametrize(
    ("task_range", "split_ranges", "expected"),
    [((-1, 9), None, (-1.0, 9.0)), (None, ((1, 4), (0, 6)), (0.0, 6.0)), (None, None, (0.0, 5.0))],
)
def test_label_range_comes_from_task_then_splits_then_train(folder, task_range, split_ranges, expected):
    entry = folder.regression()
    if task_range is not None:
        entry["label_range"] = list(task_range)
    if split_ranges is not None:
        for split, value in zip(("train", "validation"), split_ranges, strict=True):
            entry["splits"][split]["label_range"] = list(value)
    assert folder.load()[0].spec.label_range == expected


def test_missing_folder_and_index(tmp_path, raises):
    raises(lambda: load_tasks(str(tmp_path / "none")), "none", "'sentiment'", "hub:")
    raises(lambda: load_tasks(str(tmp_path)), "no index.json")
    (tmp_path / "index.json").write_text("{'tasks'")
    raises(lambda: load_tasks(str(tmp_path)), "not valid JSON")
    for text in ("[]", "{}", '{"tasks": {}}', '{"tasks": []}'):
        (tmp_path / "index.json").write_text(text)
        raises(lambda: load_tasks(str(tmp_path)), "'tasks'")
    (tmp_path / "index.json").write_text('{"format": 2, "tasks": {"a": {}}}')
    raises(lambda: load_tasks(str(tmp_path)), "format 2", "format 1")


def test_bad_selection(folder, raises):
    folder.classification("a")
    folder.classification("b")
    raises(lambda: folder.load(["a", "c"]), "'c'", "a, b")
    raises(lambda: folder.load([]), "empty", "a, b")
    raises(lambda: folder.load("a"), "string 'a'", "list")
    raises(lambda: folder.load(["a", "b", "a"]), "a more than once")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"kind": "ranking"}, ["'ranking'", "classification, regression, multiple_choice"]),
        ({"metric": "bleu"}, ["'bleu'", "matthews_corrcoef"]),
        ({"metric": "pearson"}, ["pearson", "classification task allows accuracy, f1, matthews"]),
        ({"metric": ""}, ["unknown metric ''"]),
        ({"text_columns": "sentence"}, ["text_columns", "list of strings"]),
        ({"text_columns": []}, ["text_columns", "one or two"]),
        ({"text_columns": ["a", "b", "c"]}, ["text_columns", "one or two"]),
        ({"text_columns": ["a", "a"]}, ["text_columns", "different"]),
        ({"label_names": None}, ["label_names"]),
        ({"label_names": ["yes"]}, ["label_names", "at least two"]),
        ({"label_names": ["Yes", "yes "]}, ["label_names", "different"]),
        ({"label_names": [0, 1]}, ["label_names", "list of strings"]),
        ({"label_range": [0, 1]}, ["label_range", "regression"]),
        ({"splits": []}, ["splits"]),
        ({"splits": {"train": {"file": "polarity/train.parquet"}}}, ["no split validation", "there is: train"]),
        ({"splits": {"train": {}, "validation": {}}}, ["'train'", "relative path", "None"]),
    ],
)
def test_bad_description(folder, raises, change, parts):
    folder.classification().update(change)
    raises(folder.load, "polarity", *parts)


def test_missing_key_and_bad_name(folder, raises):
    del folder.classification()["kind"]
    raises(folder.load, "kind missing", "there is:", "metric")
    folder.tasks = {"a.b": {}}
    folder.classification("a.b")
    raises(folder.load, "task name 'a.b'")
    folder.tasks = {"a": 3}
    raises(folder.load, "must be an object")


@pytest.mark.parametrize("value", [[1, 0], [0, math.inf], [0], "0..5"])
def test_bad_label_range(folder, raises, value):
    folder.regression()["label_range"] = value
    raises(folder.load, "label_range")


def test_file_missing_or_outside(folder, tmp_path, raises):
    entry = folder.classification()["splits"]["train"]
    (tmp_path / "secret.parquet").write_bytes((folder.root / entry["file"]).read_bytes())
    for file in ("../secret.parquet", "polarity/../../secret.parquet", str(tmp_path / "secret.parquet")):
        entry["file"] = file
        raises(folder.load, "polarity", "'train'", "outside")
    entry["file"] = str(folder.root / "polarity" / "train.parquet")
    raises(folder.load, "outside")
    entry["file"] = "polarity/none.parquet"
    raises(folder.load, "polarity", "'train'", "'polarity/none.parquet' is missing")
    entry["file"] = "polarity"
    raises(folder.load, "missing")


def test_links_may_not_leave_the_folder(folder, tmp_path, raises):
    path = folder.root / folder.classification()["splits"]["train"]["file"]
    inside, outside = path.with_name("real.parquet"), tmp_path / "real.parquet"
    path.rename(inside)
    os.symlink(inside, path)
    assert len(folder.load()[0].train) == 3
    inside.rename(outside)
    path.unlink()
    os.symlink(outside, path)
    raises(folder.load, "outside")


def test_folder_reached_through_a_link(folder, tmp_path):
    folder.classification()
    folder.load()
    os.symlink(folder.root, tmp_path / "link")
    assert len(load_tasks(str(tmp_path / "link"))) == 1


def test_checksum(folder, raises):
    entry = folder.classification()["splits"]["train"]
    entry["sha256"] = hashlib.sha256((folder.root / entry["file"]).read_bytes()).hexdigest()
    assert len(folder.load()[0].train) == 3
    entry["sha256"] = "0" * 64
    raises(folder.load, "'train'", "sha256", "0" * 64)


def test_not_parquet(folder, raises):
    (folder.root / folder.classification()["splits"]["validation"]["file"]).write_text("sentence,label")
    raises(folder.load, "'validation'", "not a readable parquet file")


@pytest.mark.parametrize("column", ["sentence", "label"])
def test_missing_column(folder, raises, column):
    folder.classification()
    columns = {"sentence": ["good"], "label": [1], "idx": [0]}
    del columns[column]
    folder.write("polarity/validation.parquet", columns)
    raises(folder.load, "'polarity'", "'validation'", f"'{column}'", "there is:", "idx")


def test_every_task_is_checked_before_the_first_is_read(folder, raises):
    folder.classification("first")
    folder.write("first/train.parquet", {"sentence": ["good"], "label": [9]})
    folder.classification("second")
    folder.write("second/train.parquet", {"label": [1]})
    raises(folder.load, "'second'", "no column 'sentence'")


def test_empty_split(folder, raises):
    folder.classification()
    folder.write("polarity/train.parquet", {"sentence": pa.array([], pa.string()), "label": pa.array([], pa.int8())})
    raises(folder.load, "'polarity'", "'train'", "no rows")


@pytest.mark.parametrize("label", [2, -1, 0.5, math.nan, math.inf, None, "1"])
def test_bad_class(folder, raises, label):
    folder.classification()
    good = "0" if label == "1" else 0
    folder.write("polarity/train.parquet", {"sentence": ["good", "bad"], "label": [good, label]})
    row = "row 0" if label == "1" else "row 1"
    raises(folder.load, "'polarity'", "'train'", row, "class index 0..1", "negative, positive")


@pytest.mark.parametrize("label", [math.nan, -math.inf, None])
def test_bad_number(folder, raises, label):
    folder.regression()
    folder.write("likeness/validation.parquet", {"a": ["x", "y"], "b": ["x", "y"], "label": [1.0, label]})
    raises(folder.load, "'likeness'", "'validation'", "row 1", "finite number")


def test_number_outside_its_range_and_constant_numbers(folder, raises):
    entry = folder.regression()
    entry["label_range"] = [0, 4]
    raises(folder.load, "row 0", "5.0", "from 0.0 to 4.0")
    del entry["label_range"]
    folder.write("likeness/train.parquet", {"a": ["x"], "b": ["y"], "label": [2.0]})
    raises(folder.load, "every label is 2.0")


@pytest.mark.parametrize("text", [None, 3])
def test_text_that_is_none(folder, raises, text):
    folder.classification()
    other = "good" if text is None else 4
    folder.write("polarity/train.parquet", {"sentence": [other, text], "label": [0, 1]})
    raises(folder.load, "'polarity'", "'train'", "a string is needed")


@pytest.mark.parametrize(
    ("choices", "label", "part"),
    [
        (["4", "5"], 2, "index into the row's choices"),
        (["4"], 0, "2 to 3 strings"),
        (["4", "5", "6", "7"], 0, "2 to 3 strings"),
        (None, 0, "2 to 3 strings"),
        (["4", None], 0, "must all be strings"),
    ],
)
def test_bad_choices(folder, raises, choices, label, part):
    folder.multiple_choice()
    columns = {"question": ["2+2?", "1+1?"], "choices": [["1", "2"], choices], "label": [0, label]}
    folder.write("quiz/train.parquet", columns)
    raises(folder.load, "'quiz'", "'train'", "row 1", part)


def test_real_folder(real_folder):
    for task in load_tasks(str(real_folder)):
        for split in (task.train, task.validation):
            assert split.num_rows > 0 and split.column_names[:3] == ["text", "text_pair", "label"]
            assert (split[0]["text_pair"] is None) == (
                len(task.spec.text_columns) == 1 or task.spec.kind == "multiple_choice"
            )
