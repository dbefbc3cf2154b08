"""Tasks from a user's own files: what is guessed, and every way in which a file can be wrong."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ept.data import DataError, Roles, TaskData, load_tasks, parse_roles

WORDS = ["storm", "market", "match", "tune"]


def rows(count: int = 60) -> list[dict[str, str]]:
    return [{"id": str(i), "headline": f"the {WORDS[i % 4]} of {i}", "topic": WORDS[i % 4]} for i in range(count)]


def write(path: Path, table: list[dict]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(table), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table))
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(table[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(table)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_kind_of_file_gives_the_same_task(suffix: str, tmp_path: Path) -> None:
    said: list[str] = []
    (task,) = load_tasks(write(tmp_path / f"news{suffix}", rows()), say=said.append)
    assert task.spec.name == "news"
    assert task.spec.text_columns == ("headline",)
    assert task.spec.label_names == tuple(sorted(WORDS))
    assert task.spec.metrics == ("accuracy", "f1")
    both = [*task.train, *task.validation]
    assert {(row["text"], task.spec.label_names[row["label"]]) for row in both} == {
        (row["headline"], row["topic"]) for row in rows()
    }
    assert 0 < len(task.validation) < 15 and len(both) == 60
    sizes = f"{len(task.train)} train + {len(task.validation)} validation rows (a tenth held out by a hash of the text)"
    assert said == [f"task 'news': text 'headline', label 'topic' (4 classes: market, match, storm, tune), {sizes}"]


def test_files_are_tasks_and_equal_texts_stay_together(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", rows())
    write(tmp_path / "b.jsonl", [{"text": f"t {i // 4}", "score": i / 7} for i in range(80)])
    news, mood = load_tasks([f"news={tmp_path / 'a.csv'}", str(tmp_path / "b.jsonl")])
    assert (news.spec.name, mood.spec.name) == ("news", "b")
    assert mood.spec.kind == "regression" and mood.spec.label_range == (0.0, 79 / 7)
    assert not set(mood.train["text"]) & set(mood.validation["text"])
    assert [task.spec.name for task in load_tasks(tmp_path)] == ["a", "b"]
    assert [task.spec.name for task in load_tasks(str(tmp_path), ["b"])] == ["b"]
    again = load_tasks(tmp_path / "b.jsonl")[0]
    assert again.validation["text"] == mood.validation["text"]


def test_splits_come_from_a_column_or_a_folder(tmp_path: Path) -> None:
    table = [{"text": f"t {i}", "label": i % 2, "split": ["train", "train", "dev", "Test"][i % 4]} for i in range(16)]
    (task,) = load_tasks(write(tmp_path / "one.csv", table))
    assert [len(split) for split in (task.train, task.validation, task.test)] == [8, 4, 4]
    folder = tmp_path / "all" / "topic"
    folder.mkdir(parents=True)
    write(folder / "train.csv", rows(20))
    write(folder / "validation.jsonl", rows(4))
    (task,) = load_tasks(tmp_path / "all")
    assert task.spec.name == "topic" and (len(task.train), len(task.validation)) == (20, 4) and task.test is None


@pytest.mark.parametrize(
    ("table", "kind", "names"),
    [
        ([{"text": f"t {i}", "label": i % 3} for i in range(40)], "classification", ("0", "1", "2")),
        ([{"text": f"t {i}", "label": str(i % 3)} for i in range(40)], "classification", ("0", "1", "2")),
        ([{"text": f"t {i}", "label": bool(i % 2)} for i in range(40)], "classification", ("False", "True")),
        ([{"text": f"t {i}", "label": i} for i in range(40)], "regression", None),
        ([{"text": f"t {i}", "label": (i % 5) / 2} for i in range(40)], "regression", None),
    ],
)
def test_labels_tell_the_kind(table: list[dict], kind: str, names: tuple[str, ...] | None, tmp_path: Path) -> None:
    (task,) = load_tasks(write(tmp_path / "t.jsonl", table))
    assert (task.spec.kind, task.spec.label_names) == (kind, names)
    (task,) = load_tasks(write(tmp_path / "t.csv", table))
    assert (task.spec.kind, task.spec.label_names) == (kind, names)


def test_pairs_and_named_columns(tmp_path: Path) -> None:
    table = [
        {"premise": f"p {i}", "hypothesis": f"h {i}", "other": "z", "label": ["no", "yes"][i % 2]} for i in range(40)
    ]
    path = write(tmp_path / "t.jsonl", table)
    (task,) = load_tasks(path)
    assert task.spec.text_columns == ("premise", "hypothesis")
    assert task.train[0]["text_pair"].startswith("h ")
    (task,) = load_tasks(path, columns={"t": Roles(("hypothesis",), "label")})
    assert task.spec.text_columns == ("hypothesis",)
    assert parse_roles("t=a,b:y") == ("t", Roles(("a", "b"), "y"))
    for bad in ("t", "t=a", "t=a,b,c:y", "=a:y", "t=:y"):
        with pytest.raises(ValueError, match="must be TASK=TEXT:LABEL"):
            parse_roles(bad)


LINES = "text,label\n" + "".join(f"t {i},{'ab'[i % 2]}\n" for i in range(40))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "text,label\na b,x\n", "too few to hold out a validation split"),
        ("t.csv", "", "t.csv has no rows"),
        ("t.csv", "text,label\n", "has no rows"),
        ("t.csv", "text,label\na b,x,y\n", "row 0 has 3 fields, the first line 2"),
        ("t.csv", "text,text\na,b\n", "must name the columns, each differently"),
        ("t.csv", b"text,label\n\xff,x\n", "t.csv cannot be read"),
        ("t.jsonl", "{'text': 1}\n", "t.jsonl cannot be read"),
        ("t.jsonl", "[1]\n", "line 1 is not an object"),
        ("t.parquet", "nothing", "t.parquet cannot be read"),
        ("t.csv", "one,two\na b,c d\ne f,g h\n", "cannot be guessed from one, two; name them: --columns t=TEXT:LABEL"),
        ("t.csv", "text,label\n" + "".join(f"t {i},same\n" for i in range(40)), r"every label is \('same',\)"),
        ("t.csv", "text,label\n" + "".join(f"t {i},w{i} z\n" for i in range(400)), "which reads like text"),
        (
            "t.csv",
            LINES + "x y,\n",
            "label is ''; a label",
        ),
        ("t.csv", LINES + " ,a\n", "text is blank"),
        ("t.csv", "text,label,split\na b,x,holdout\n", "split is 'holdout'; allowed: train"),
        ("t.csv", "text,label,split\na b,x,test\n", "no row of the split train; there is: test"),
    ],
)
def test_what_is_wrong_is_named(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        load_tasks(path)


def test_sources_that_are_not_there_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", rows())
    for source, message in [
        (str(tmp_path / "none.csv"), "is not a file"),
        (f"x={tmp_path / 'none.txt'}", "is not a file"),
        ([str(path), f"t={path}"], "the task 't' is given twice"),
        ([str(path), "sentiment"], "'sentiment' is not one of several files"),
        ([], "data source is empty"),
    ]:
        with pytest.raises(DataError, match=message):
            load_tasks(source)
    with pytest.raises(DataError, match="columns names the task 'u'; there is: t"):
        load_tasks(path, columns={"u": Roles(("headline",), "topic")})
    with pytest.raises(DataError, match="no column 'body'; there is: id, headline, topic"):
        load_tasks(path, columns={"t": Roles(("body",), "topic")})
    write(tmp_path / "t.jsonl", rows())
    with pytest.raises(DataError, match="two tables of the name 't'"):
        load_tasks(tmp_path)


def test_a_task_checks_its_splits(tmp_path: Path) -> None:
    (task,) = load_tasks(write(tmp_path / "t.csv", rows()))
    with pytest.raises(DataError, match=r"split 'train': must be a datasets\.Dataset"):
        TaskData(task.spec, [{"text": "a"}], task.validation)
    with pytest.raises(DataError, match="split 'validation': no column 'label'"):
        TaskData(task.spec, task.train, task.validation.remove_columns(["label"]))
    with pytest.raises(DataError, match="split 'test': no rows"):
        TaskData(task.spec, task.train, task.validation, task.train.select([]))
