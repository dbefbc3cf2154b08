"""What this environment holds of the package's dependencies: exact versions for CI, or their licences.

``make lock`` writes both: ``dependencies.py lock`` the constraints file ``requirements/ci-pythonX.Y.lock``, and
``dependencies.py licences`` the table ``docs/licences.md``. Both follow ``Requires-Dist`` from ``ept-kernels`` with its
extras, as far as they are installed, and read nothing but the metadata of installed packages.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PACKAGE = "ept-kernels"
#: Who needs a dependency, the strictest first; ``make`` itself installs what builds the native kernels.
GROUPS = {"": "everyone", "train": "[train]", "triton": "[triton]", "test": "[test]", "docs": "[docs]"}
BUILD = ("cmake", "ninja")
#: Chosen by ``make`` for the machine (a build for its CPU or its GPU), so no lock names it.
OF_THE_MACHINE = "torch"


def needed(distribution: str, extras: frozenset[str]) -> Iterator[Requirement]:
    """What an installed distribution requires with these extras, on this machine."""
    for text in metadata.requires(distribution) or ():
        requirement = Requirement(text)
        environments = [{"extra": extra} for extra in (extras or {""})]
        if requirement.marker is None or any(map(requirement.marker.evaluate, environments)):
            yield requirement


def closure(*groups: str) -> dict[str, metadata.Distribution]:
    """All that ``ept-kernels`` with these extras needs and that is installed, itself left out, by normalised name."""
    found: dict[str, metadata.Distribution] = {}
    start = Requirement(f"{PACKAGE}[{','.join(groups)}]")
    waiting, seen = [start, *(map(Requirement, BUILD) if "test" in groups else ())], set()
    while waiting:
        requirement = waiting.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if name != PACKAGE:
            found[name] = distribution
        waiting += needed(name, extras)
    return dict(sorted(found.items()))


def lock() -> str:
    python = ".".join(map(str, sys.version_info[:2]))
    lines = [
        f"# Versions that CI installs with Python {python}; written by `make lock`, used by `make` with -c.",
        "# Neither torch, which make chooses for the machine, nor hashes: pip takes none for an editable installation.",
    ]
    lines += [f"{name}=={found.version}" for name, found in closure("test", "docs").items() if name != OF_THE_MACHINE]
    return "\n".join(lines)


def licence(distribution: metadata.Distribution) -> str:
    """As the distribution states it: an SPDX expression, else its classifiers, else the first line of its text."""
    fields = distribution.metadata
    if expression := fields.get("License-Expression"):
        return expression
    classified = [
        line.split(" :: ")[-1] for line in fields.get_all("Classifier") or () if line.startswith("License ::")
    ]
    named = ", ".join(name for name in classified if name != "OSI Approved")
    if named:
        return named
    text = (fields.get("License") or "").strip().splitlines()
    return text[0] if text else "not stated in its metadata"


def licences() -> str:
    lines = [
        "# Licences of the dependencies",
        "",
        "Read from the metadata of the packages that CI installs, by `make lock`. This package is Apache-2.0 and holds",
        "none of them. The CUDA builds of torch bring NVIDIA's libraries, under NVIDIA's own terms.",
        "",
        "| package | version | needed by | licence |",
        "|---|---|---|---|",
    ]
    listed: set[str] = set()
    for extra, who in GROUPS.items():
        for name, found in closure(extra).items():
            if name not in listed:
                version = re.sub(r"\+.*", "", found.version)
                lines.append(f"| {name} | {version} | {who} | {licence(found).replace('|', '/')} |")
                listed.add(name)
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:] not in (["lock"], ["licences"]):
        sys.exit("usage: dependencies.py lock|licences")
    print(lock() if sys.argv[1] == "lock" else licences())
