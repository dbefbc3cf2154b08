"""Tasks from datasets of the hub, through the `datasets` library; GLUE is known by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets

from .spec import DataError, TaskData, TaskSpec, make_split, select

PREFIX = "hub:"
_GLUE_IDS = ("glue", "nyu-mll/glue")
_VALIDATION = ("validation", "validation_matched", "dev", "test")


@dataclass(frozen=True)
class _Glue:
    text_columns: tuple[str, ...]
    metrics: tuple[str, ...]


_GLUE = {
    "mnli": _Glue(("premise", "hypothesis"), ("accuracy",)),
    "qqp": _Glue(("question1", "question2"), ("accuracy", "f1")),
    "qnli": _Glue(("question", "sentence"), ("accuracy",)),
    "sst2": _Glue(("sentence",), ("accuracy",)),
    "stsb": _Glue(("sentence1", "sentence2"), ("pearson", "spearman")),
    "mrpc": _Glue(("sentence1", "sentence2"), ("accuracy", "f1")),
    "rte": _Glue(("sentence1", "sentence2"), ("accuracy",)),
    "cola": _Glue(("sentence",), ("matthews",)),
}


def load_hub(
    dataset: str, tasks: Sequence[str] | None = None, *, cache_dir: str | Path | None = None
) -> list[TaskData]:
    """Load tasks of the dataset ``<id>`` or ``<id>@<revision>`` of the hub, or of a local dataset directory.

    GLUE (``nyu-mll/glue``): the tasks are its configurations; mnli validates on ``validation_matched``.

    Any other dataset: the tasks are its configurations, each a classification (accuracy) with exactly one ClassLabel
    column and one or two string columns. A dataset of only one configuration gives one task, called after it.

    Validation is the first of the splits validation, validation_matched, dev, test that is there and labelled.

    Raises:
        DataError: unknown task, the hub is out of reach, or the dataset has another shape.
    """
    identifier, _, revision = dataset.partition("@")
    source = _Source(identifier, revision or None, None if cache_dir is None else str(cache_dir))
    if identifier in _GLUE_IDS:
        return [_glue_task(name, source.load(name)) for name in select(tasks, list(_GLUE), "GLUE")]
    configurations = source.configurations()
    if len(configurations) == 1:
        named = {Path(identifier).name.replace(".", "_"): configurations[0]}
    else:
        named = {name.replace(".", "_"): name for name in configurations}
    return [_generic_task(name, source.load(named[name])) for name in select(tasks, list(named), f"{identifier!r}")]


@dataclass(frozen=True)
class _Source:
    identifier: str
    revision: str | None
    cache_dir: str | None

    def configurations(self) -> list[str]:
        return self._reach(lambda: datasets.get_dataset_config_names(self.identifier, revision=self.revision))

    def load(self, configuration: str) -> Mapping[str, datasets.Dataset]:
        return self._reach(
            lambda: datasets.load_dataset(
                self.identifier, configuration, revision=self.revision, cache_dir=self.cache_dir
            )
        )

    def _reach(self, action):
        """Whatever goes wrong in a foreign loader (network, missing dataset, its own code) becomes one clear error."""
        try:
            return action()
        except Exception as error:
            reason = str(error).strip().splitlines() or [""]
            raise DataError(
                f"the dataset {self.identifier!r} could not be loaded ({type(error).__name__}: {reason[0]}). Without "
                "network use --data sentiment (once it is cached) or --data FOLDER (a folder with an index.json)."
            ) from error


def _glue_task(name: str, splits: Mapping[str, datasets.Dataset]) -> TaskData:
    known = _GLUE[name]
    _require(name, splits, known.text_columns, "label")
    if "pearson" in known.metrics:
        spec = TaskSpec(name, "regression", known.text_columns, None, known.metrics, (0.0, 5.0))
    else:
        labels = tuple(splits["train"].features["label"].names)
        spec = TaskSpec(name, "classification", known.text_columns, labels, known.metrics)
    return _task(spec, "label", splits)


def _generic_task(name: str, splits: Mapping[str, datasets.Dataset]) -> TaskData:
    _require(name, splits, (), None)
    features = splits["train"].features
    classes = [key for key, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    texts = [key for key, feature in features.items() if getattr(feature, "dtype", None) == "string"]
    if len(classes) != 1 or len(texts) not in (1, 2):
        raise DataError(
            f"task {name!r}: one ClassLabel column and one or two string columns are needed; found ClassLabel "
            f"{classes} and strings {texts}. Save it as a folder with an index.json to say which to use."
        )
    spec = TaskSpec(name, "classification", tuple(texts), tuple(features[classes[0]].names), ("accuracy",))
    return _task(spec, classes[0], splits)


def _require(name: str, splits: Mapping[str, datasets.Dataset], texts: Sequence[str], label: str | None) -> None:
    if "train" not in splits:
        raise DataError(f"task {name!r}: no split 'train'; there is: {', '.join(splits)}")
    columns = splits["train"].column_names
    for column in (*texts, *([label] if label else [])):
        if column not in columns:
            raise DataError(f"task {name!r}, split 'train': no column {column!r}; there is: {', '.join(columns)}")


def _task(spec: TaskSpec, label: str, splits: Mapping[str, datasets.Dataset]) -> TaskData:
    labelled = [split for split in _VALIDATION if split in splits and _is_labelled(splits[split], label)]
    if not labelled:
        raise DataError(
            f"task {spec.name!r}: no labelled split among {', '.join(_VALIDATION)}; there is: {', '.join(splits)}"
        )
    built = {split: _split(spec, split, label, splits[split]) for split in ("train", labelled[0])}
    test = _split(spec, "test", label, splits["test"]) if "test" in labelled[1:] else None
    return TaskData(spec, built["train"], built[labelled[0]], test)


def _is_labelled(rows: datasets.Dataset, label: str) -> bool:
    """Hidden test labels are published as -1 (or null) throughout."""
    return label in rows.column_names and not all(value is None or value == -1 for value in rows[label])


def _split(spec: TaskSpec, split: str, label: str, rows: datasets.Dataset) -> datasets.Dataset:
    texts = [list(rows[column]) for column in spec.text_columns]
    return make_split(
        spec, split, text=texts[0], text_pair=texts[1] if len(texts) == 2 else None, label=list(rows[label])
    )
