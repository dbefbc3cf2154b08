"""Runs of ``ept-train`` in processes of their own that start in a fraction of a second, to be killed or constrained."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

UNFINISHED = "_unfinished"  # of ept.training.checkpointing, which only the runs import

#: Imported once, in a process that every run is forked from.
_PRELOADED = [
    "matplotlib.backends.backend_agg",
    "transformers.models.bert.modeling_bert",
    "transformers.models.bert.configuration_bert",
    "ept.train",
]

_WRITING = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}

#: How a process ends that could not be put under its constraint.
UNAVAILABLE = 77


@dataclass(frozen=True)
class Conditions:
    """What a process has to live with.

    Attributes:
        file_bytes: no file may grow larger; a write beyond it fails as on a full disk. Needs no privileges.
        disk: a folder, and the bytes of the file system that is put there for this process. Needs a mount namespace.
        read_only: a folder that cannot be written to, not by root either. Needs a mount namespace.
        environment: variables to set.
        killed_after: seconds of processor time after which the process is killed with SIGKILL, whatever it does.
        killed_at: it is killed at this operation on files of a checkpoint that is being written or deleted, or in the
            middle of what follows: this many seconds later.
        poisoned_rank: the process of a distributed run in which a layer gives NaN at the third step.
    """

    file_bytes: int | None = None
    disk: tuple[Path, int] | None = None
    read_only: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    killed_after: float | None = None
    killed_at: tuple[int, float] | None = None
    poisoned_rank: int | None = None

    def apply(self) -> None:
        """Put this process under them."""
        os.environ.update(self.environment)
        if self.file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.file_bytes, resource.RLIM_INFINITY))
        if self.disk is not None or self.read_only is not None:
            _leave_mount_namespace()
        if self.disk is not None:
            folder, size = self.disk
            _run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
        if self.read_only is not None:
            _run("mount", "--bind", str(self.read_only), str(self.read_only))
            _run("mount", "-o", "remount,ro,bind", str(self.read_only))
        if self.killed_after is not None:
            threading.Thread(target=_die_after, args=(self.killed_after,), daemon=True).start()
        if self.killed_at is not None:
            _die_at(*self.killed_at)
        if self.poisoned_rank is not None:
            _poison(self.poisoned_rank)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"{' '.join(command)}: {done.stderr.strip()}", flush=True)
        os._exit(UNAVAILABLE)


def _leave_mount_namespace() -> None:
    import ctypes

    new_mounts = 0x00020000  # CLONE_NEWNS
    if ctypes.CDLL(None, use_errno=True).unshare(new_mounts):
        print(f"unshare of mounts: {os.strerror(ctypes.get_errno())}", flush=True)
        os._exit(UNAVAILABLE)
    _run("mount", "--make-rprivate", "/")


def _die_after(seconds: float) -> None:
    while time.process_time() < seconds:
        time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGKILL)


def _die_at(operation: int, seconds: float) -> None:
    """Count what Python tells auditors of: opening, syncing (which opens), renaming and deleting files."""
    left = operation

    def die() -> None:
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, args: tuple[Any, ...]) -> None:
        nonlocal left
        if left and event in _WRITING and any(f"/{UNFINISHED}/" in str(arg) for arg in args):
            left -= 1
            if not left:
                threading.Thread(target=die, daemon=True).start() if seconds else die()

    sys.addaudithook(audit)


def _poison(rank: int) -> None:
    from ept.training import EPTTrainer
    from ept.tuner.layer import EPTLinearLayer

    train = EPTTrainer.train

    def spoiled(self: EPTTrainer, *args: Any, **kwargs: Any) -> Any:
        def spoil(module: Any, inputs: Any, output: Any) -> Any:
            return output * float("nan") if self.state.global_step == 2 and self.is_in_train else None

        if self.args.process_index == rank:
            next(m for m in self.model.modules() if isinstance(m, EPTLinearLayer)).register_forward_hook(spoil)
        return train(self, *args, **kwargs)

    EPTTrainer.train = spoiled


def make_context() -> multiprocessing.context.BaseContext:
    """A way to start processes from one that has imported everything and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def ept_train(arguments: Sequence[str], log: Path, conditions: Conditions) -> None:
    """``ept-train`` with these arguments, in this process; what it prints goes to ``log``."""
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    conditions.apply()
    import torch

    from ept import train

    torch.set_num_threads(1)
    code = train.main(arguments)
    print(f"processor time: {time.process_time()}", flush=True)
    sys.exit(code)


def start(
    context: multiprocessing.context.BaseContext,
    arguments: Sequence[str],
    log: Path,
    conditions: Conditions | None = None,
) -> BaseProcess:
    """Start ``ept-train``; ``exitcode`` of the result says how it ended."""
    process = context.Process(target=ept_train, args=(list(arguments), log, conditions or Conditions()), daemon=True)
    process.start()
    return process


def run(
    context: multiprocessing.context.BaseContext,
    arguments: Sequence[str],
    log: Path,
    conditions: Conditions | None = None,
) -> tuple[int, str]:
    """``ept-train`` from start to end: exit code and what it printed, which ``log`` holds as well."""
    before = log.stat().st_size if log.exists() else 0
    process = start(context, arguments, log, conditions)
    process.join()
    return process.exitcode, log.read_text()[before:]
