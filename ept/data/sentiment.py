"""The default tasks: human sentiment ratings of sentences in four registers.

The sentences come with vaderSentiment 3.3.2 (copyright (c) 2016 C.J. Hutto, MIT licence); cite C.J. Hutto and
E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text", ICWSM 2014. They are
fetched once (`ept.data.archive`) and never part of this package. Each sentence has the mean valence that about 20
readers gave it, from -4 (very negative) to 4. Each register becomes the task that its distribution suits:

============  =======  ==============  =========================================================================
task          rows     kind            why
============  =======  ==============  =========================================================================
tweets        4,200    regression      intensity (capitals, '!!!', emoticons) is what these sentences vary in;
                                       69 % lean positive, so polarity would be lopsided
movies        10,043   2 classes       chosen from positive and negative reviews: two clear humps, half and half;
                                       the 5 % that are rated within 0.5 of neutral are left out
products      3,707    3 classes       half opinion, half description: negative 33 %, neutral (within 0.5) 21 %,
                                       positive 46 %; scored by accuracy and macro F1
editorials    5,190    regression      one hump around neutral: mild shades, no clear classes
============  =======  ==============  =========================================================================

Train and validation (15 %) are split by a hash, so they are the same everywhere. What belongs together stays together:
sentences of one product review or one editorial; elsewhere, texts that differ only in case, punctuation or spacing (the
tweets hold hand-made variants). Texts of the validation split that occur again in another group leave the train split.

The movie sentences are those that GLUE's SST-2 is made of (they hold 717 of the 872 sentences of its validation split):
do not report SST-2 after training on movies.
"""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ept.data.archive import sentiment_archive
from ept.data.rows import make_split
from ept.data.selection import select
from ept.data.spec import DataError, TaskData, TaskSpec

_INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_MEMBER = "hutto_ICWSM_2014/{}_GroundTruth.txt"
_LIMIT_BYTES = 8 << 20
_NEUTRAL = 0.5
_VALIDATION_SHARE = 0.15
_VALENCE = (-4.0, 4.0)


@dataclass(frozen=True)
class _Register:
    """One register: its file, its task, and the label of a mean valence (None: the row is left out)."""

    file: str
    spec: TaskSpec
    label: Callable[[float], float | None]
    grouped: bool


def _polarity(valence: float) -> int | None:
    return None if abs(valence) <= _NEUTRAL else int(valence > 0)


def _three_way(valence: float) -> int:
    return 1 if abs(valence) <= _NEUTRAL else 2 * int(valence > 0)


def _regression(name: str) -> TaskSpec:
    return TaskSpec(name, "regression", ("sentence",), None, ("pearson", "spearman"), _VALENCE)


def _classification(name: str, labels: tuple[str, ...], metrics: tuple[str, ...]) -> TaskSpec:
    return TaskSpec(name, "classification", ("sentence",), labels, metrics)


_POLAR = _classification("movies", ("negative", "positive"), ("accuracy",))
_THREE = _classification("products", ("negative", "neutral", "positive"), ("accuracy", "f1"))
_REGISTERS = {
    register.spec.name: register
    for register in (
        _Register("tweets", _regression("tweets"), float, grouped=False),
        _Register("movieReviewSnippets", _POLAR, _polarity, grouped=False),
        _Register("amazonReviewSnippets", _THREE, _three_way, grouped=True),
        _Register("nytEditorialSnippets", _regression("editorials"), float, grouped=True),
    )
}


def load_sentiment(tasks: Sequence[str] | None = None, *, cache_dir: str | Path | None = None) -> list[TaskData]:
    """The named ones (None: all four) of the tasks tweets, movies, products, editorials.

    Raises:
        DataError: unknown task, or the data can neither be found in the cache nor fetched.
    """
    names = select(tasks, list(_REGISTERS), "the data 'sentiment'")
    with tarfile.open(fileobj=io.BytesIO(sentiment_archive(cache_dir)), mode="r:gz") as outer:
        inner = _read_member(outer, _INNER)
    with tarfile.open(fileobj=io.BytesIO(inner), mode="r:gz") as tar:
        return [_build(_REGISTERS[name], _read_member(tar, _MEMBER.format(_REGISTERS[name].file))) for name in names]


def _read_member(tar: tarfile.TarFile, name: str) -> bytes:
    """One regular member, in memory; nothing is ever unpacked to disk."""
    member = tar.getmember(name)
    if not member.isfile() or member.size > _LIMIT_BYTES:
        raise DataError(f"archive member {name!r} is not a plain file of at most {_LIMIT_BYTES} bytes")
    file = tar.extractfile(member)
    assert file is not None, "a plain file has content"
    return file.read()


def _build(register: _Register, content: bytes) -> TaskData:
    """Lines are ``id <tab> mean valence <tab> sentence``; the id of grouped registers is ``group_number``."""
    rows: dict[str, list[tuple[str, float]]] = {"train": [], "validation": []}
    for line in content.decode("utf-8-sig").splitlines():
        identifier, valence, text = line.split("\t")
        label = register.label(float(valence))
        if label is not None:
            group = identifier.split("_")[0] if register.grouped else _key(text)
            rows[_split_of(register.spec.name, group)].append((text.strip(), label))
    held_out = {_key(text) for text, _ in rows["validation"]}
    rows["train"] = [(text, label) for text, label in rows["train"] if _key(text) not in held_out]
    splits = {
        split: make_split(register.spec, split, text=[text for text, _ in kept], label=[label for _, label in kept])
        for split, kept in rows.items()
    }
    return TaskData(register.spec, **splits)


def _split_of(task: str, group: str) -> str:
    digest = hashlib.sha256(f"{task}:{group}".encode()).digest()
    return "validation" if int.from_bytes(digest[:8], "big") < _VALIDATION_SHARE * 2**64 else "train"


def _key(text: str) -> str:
    """What is left of a text without case, punctuation and spacing; the text itself if that is nothing (``:-)``)."""
    return re.sub(r"[\W_]+", "", text).casefold() or text
