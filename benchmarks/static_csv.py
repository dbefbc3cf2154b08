"""The static check's CSV file: a row for each compiled kernel, written as it comes and read again to go on from there.

A row is known by its key: a digest of the kernel's source (with all that it calls), its specialisation, the target and
Triton's version. What changed is compiled again, what did not is not.
"""

from __future__ import annotations

import csv
import hashlib
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import triton
from static_compile import Compiled, MachineCode
from static_record import Launch

NAMES = ("kernel", "tiles", "target", "dtype", "variant", "call")
CODE = tuple(field.name for field in fields(MachineCode))
COLUMNS = ("key", *NAMES, *CODE, "occupancy", "wrong", "error", "seconds")

Row = dict[str, str]


def tiles(launch: Launch) -> str:
    """Tile sizes, warps and stages: ``T64 C128 / 4 warps / 3 stages``."""
    sizes = " ".join(
        name.removeprefix("BLOCK_").replace("GROUP_", "G") + str(size) for name, size in launch.config.tiles
    )
    return f"{sizes} / {launch.config.num_warps} warps / {launch.config.num_stages} stages"


def key(launch: Launch) -> str:
    """What the machine code depends on, in 20 hexadecimal digits."""
    source = getattr(import_module(launch.module), launch.kernel).cache_key
    parts = (triton.__version__, launch.target, source, launch.specialisation)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20]


def row(result: Compiled, wrong: list[str]) -> Row:
    """A result as the file holds it, all values as text."""
    launch, code = result.launch, result.code
    values = {"key": key(launch), "tiles": tiles(launch), "variant": launch.variant, "call": launch.call.name}
    values |= {name: getattr(launch, name) for name in ("kernel", "target", "dtype")}
    if code is not None:
        values |= {name: str(getattr(code, name)) for name in CODE}
        values["matrix"] = ", ".join(f"{count} {name}" for name, count in code.matrix.items())
    values |= {"occupancy": f"{result.occupancy:.3f}", "wrong": "; ".join(wrong), "error": result.error}
    values["seconds"] = f"{result.seconds:.2f}"
    return {name: values.get(name, "") for name in COLUMNS}


def restored(launch: Launch, known: Row) -> Compiled:
    """The result of ``launch`` that a row holds."""
    code = None
    if not known["error"]:
        numbers = {name: int(known[name]) for name in CODE if name != "matrix"}
        counts = (part.split() for part in known["matrix"].split(", ") if part)
        code = MachineCode(**numbers, matrix={name: int(count) for count, name in counts})
    return Compiled(launch, code, known["error"], float(known["occupancy"]), float(known["seconds"]))


def read(path: Path) -> dict[str, Row]:
    """Rows by key; none if there is no file.

    Raises:
        ValueError: the file has other columns.
    """
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{str(path)!r} must have the columns {', '.join(COLUMNS)}, got {reader.fieldnames}")
        return {known["key"]: known for known in reader}


def start(path: Path) -> None:
    """Make an empty file with the header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerow(COLUMNS)


def append(path: Path, added: Row) -> None:
    """Add a row; the file is whole again after each."""
    with path.open("a", newline="") as file:
        csv.DictWriter(file, COLUMNS).writerow(added)
