"""Runs of ``ept-train`` in processes of their own that start in a fraction of a second and may be killed."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

#: Imported once, in a process that every run is forked from.
_PRELOADED = [
    "matplotlib.backends.backend_agg",
    "transformers.models.bert.modeling_bert",
    "transformers.models.bert.configuration_bert",
    "ept.train",
]


def make_context() -> multiprocessing.context.BaseContext:
    """A way to start processes from one that has imported everything and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def ept_train(arguments: Sequence[str], log: Path) -> None:
    """``ept-train`` with these arguments, in this process; what it prints goes to ``log``."""
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch

    from ept import train

    torch.set_num_threads(1)
    sys.exit(train.main(arguments))


def start(context: multiprocessing.context.BaseContext, arguments: Sequence[str], log: Path) -> BaseProcess:
    """Start ``ept-train``; ``exitcode`` of the result says how it ended."""
    process = context.Process(target=ept_train, args=(list(arguments), log), daemon=True)
    process.start()
    return process
