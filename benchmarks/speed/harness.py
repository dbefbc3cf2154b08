"""What benchmarks share: alternating timing, quantiles, where a number comes from.

On a GPU a sample is the time between two CUDA events around one call, after the L2 cache has been filled with other
data. On a CPU
it is ``time.perf_counter`` around as many calls as make a sample worth reading (its caches hold what the call before,
another candidate's, left there). Either way every round calls every candidate once, in an order drawn anew, so that a
slow minute of a shared machine hits all of them.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ept_kernels.doctor import processor

#: Samples shorter than this are made of several calls (CPU): long enough to hold a scheduler's time slices.
MINIMUM_SAMPLE_SECONDS = 20e-3
#: Reading this many bytes evicts the L2 cache of any GPU now sold; writing them would leave lines to write back.
FLUSH_BYTES = 256 * 2**20
#: Calls before the first sample: allocators, autotuners and thread pools settle.
WARM_UP_CALLS = 2

#: Where ``carry.py`` notes the commit, for a machine that gets the files without their history.
COMMIT_FILE = Path(__file__).parents[2] / "carry" / "COMMIT"
PACKAGES = ("torch", "triton", "peft", "ept-kernels")


@dataclass(frozen=True)
class Timed:
    """A call to measure, and what ``forced_backend`` forces meanwhile (None: whichever backend is automatic)."""

    call: Callable[[], object]
    backend: str | None = None


@contextlib.contextmanager
def forced_backend(name: str | None) -> Iterator[None]:
    """``EPT_BACKEND=name`` inside; with None, unset. ``triton:PLAN`` sets ``EPT_GPU_PLAN=PLAN`` as well."""
    backend, _, plan = (name or "").partition(":")
    forced = {"EPT_BACKEND": backend, **({"EPT_GPU_PLAN": plan} if plan else {})}
    before = {variable: os.environ.pop(variable, None) for variable in forced}
    os.environ.update({variable: value for variable, value in forced.items() if value})
    try:
        yield
    finally:
        for variable, value in before.items():
            os.environ.pop(variable, None)
            if value is not None:
                os.environ[variable] = value


class CpuClock:
    """Wall time. A sample is as many calls of a candidate as last ``MINIMUM_SAMPLE_SECONDS``."""

    def __init__(self, candidates: Mapping[str, Timed]) -> None:
        self._calls = {name: self._repeats(timed) for name, timed in candidates.items()}

    @staticmethod
    def _repeats(timed: Timed) -> int:
        with forced_backend(timed.backend):
            start = time.perf_counter()
            timed.call()
            seconds = time.perf_counter() - start
        return max(1, round(MINIMUM_SAMPLE_SECONDS / max(seconds, 1e-9)))

    def sample(self, name: str, timed: Timed) -> Callable[[], float]:
        """Call, and return what gives the seconds of one call once the round is over."""
        repeats = self._calls[name]
        start = time.perf_counter()
        for _ in range(repeats):
            timed.call()
        seconds = (time.perf_counter() - start) / repeats
        return lambda: seconds

    def finish_round(self) -> None:
        """Nothing is under way."""


class CudaClock:
    """GPU time between two events. Nothing waits for the GPU before the round is over.

    So the host runs ahead of it, as in a model, and its work shows only where it is slower than the GPU's.
    """

    def __init__(self, device: torch.device) -> None:
        self._flush = torch.zeros(FLUSH_BYTES // 4, device=device)
        self._device = device

    def sample(self, name: str, timed: Timed) -> Callable[[], float]:
        """Call, and return what gives the seconds of one call once the round is over."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.sum()
        start.record()
        timed.call()
        end.record()
        return lambda: start.elapsed_time(end) / 1e3

    def finish_round(self) -> None:
        """Wait for the GPU."""
        torch.cuda.synchronize(self._device)


def timing_method(device: torch.device) -> str:
    """How ``alternate`` measures there, in words."""
    return "CUDA events, L2 flushed" if device.type == "cuda" else "perf_counter"


def alternate(
    candidates: Mapping[str, Timed],
    rounds: int,
    device: torch.device,
    *,
    budget: float = float("inf"),
    minimum_rounds: int = 3,
    seed: int = 0,
    progress: Callable[[float], None] = lambda fraction: None,
) -> dict[str, list[float]]:
    """Seconds of every candidate in every round.

    Args:
        candidates: what to call; each is called once a round (several times where one call is too short).
        rounds: how many rounds.
        device: where the calls run.
        budget: seconds after which no further round starts, once there are ``minimum_rounds``.
        minimum_rounds: see ``budget``.
        seed: of the orders.
        progress: called after every round with the fraction done.

    Returns:
        name -> seconds by round; the lists are of one length, and entry i of each is from the same round.

    Raises:
        ValueError: fewer than one round.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    for timed in candidates.values():
        with forced_backend(timed.backend):
            for _ in range(WARM_UP_CALLS):
                timed.call()
    clock = CudaClock(device) if device.type == "cuda" else CpuClock(candidates)
    shuffle = random.Random(seed).shuffle
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    collected = gc.isenabled()
    gc.disable()  # a collection would land on whichever candidate happens to run
    try:
        deadline = time.perf_counter() + budget
        for done in range(rounds):
            if done >= minimum_rounds and time.perf_counter() > deadline:
                break
            shuffle(order)
            results = {}
            for name in order:
                with forced_backend(candidates[name].backend):
                    results[name] = clock.sample(name, candidates[name])
            clock.finish_round()
            for name, seconds in results.items():
                samples[name].append(seconds())
            progress((done + 1) / rounds)
    finally:
        if collected:
            gc.enable()
    return samples


@dataclass(frozen=True)
class Spread:
    """Median and the 20 % and 80 % quantiles."""

    low: float
    median: float
    high: float


def spread(samples: Sequence[float]) -> Spread:
    """Quantiles of at least one sample, interpolated linearly between order statistics."""
    if len(samples) == 1:
        return Spread(samples[0], samples[0], samples[0])
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    return Spread(cuts[1], statistics.median(samples), cuts[7])


def ratio_spread(samples: Sequence[float], baseline: Sequence[float]) -> Spread:
    """Quantiles of the ratio to the baseline round by round: what slows a whole round cancels."""
    return spread([mine / theirs for mine, theirs in zip(samples, baseline, strict=True)])


# --- where a number comes from ----------------------------------------------------------------------------------------


def pick_device(name: str | None = None) -> torch.device:
    """The device named, else the current GPU, else the CPU."""
    if name is not None:
        return torch.device(name)
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def device_name(device: torch.device) -> str:
    """The maker's name for a GPU, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _gpu_runtime() -> str:
    """What torch was built for: "cuda 13.0", "hip 6.4", or "none"."""
    built = {"cuda": torch.version.cuda, "hip": torch.version.hip}
    return next((f"{name} {version}" for name, version in built.items() if version), "none")


def load() -> float | str:
    """Processes that wanted a CPU in the last minute, on average; "" where the system does not say."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else ""


def commit() -> str:
    """The commit of this checkout, marked ``-dirty`` where tracked files differ from it.

    Outside git what ``carry.py`` noted, else "unknown".
    """
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    with contextlib.suppress(OSError):
        described = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
        if described.returncode == 0:
            return described.stdout.strip()
    return COMMIT_FILE.read_text().strip() if COMMIT_FILE.exists() else "unknown"


def provenance(device: torch.device) -> dict[str, str]:
    """Device, threads, versions, commit, and whether Triton tunes: what every row of results carries."""
    return {
        "device": device_name(device),
        "device_type": device.type,
        "threads": str(torch.get_num_threads()),
        "cpus": str(os.cpu_count() or 1),
        "python": platform.python_version(),
        **{package.replace("-", "_"): _version(package) for package in PACKAGES},
        "gpu_runtime": _gpu_runtime(),
        "commit": commit(),
        "triton_autotune": os.environ.get("EPT_TRITON_AUTOTUNE") or "0",
    }
