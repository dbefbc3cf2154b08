"""The source archive of vaderSentiment 3.3.2: fetched once, through pip, into the user's cache.

pip brings the user's own settings (mirrors, proxies, offline folders), and a requirement with a hash makes it check the
archive before anything in it is looked at. pip prepares a source archive's metadata even when it only downloads, which
needs setuptools: the installed one is tried first, then one that pip fetches for the occasion.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from ept.data.spec import DataError

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
