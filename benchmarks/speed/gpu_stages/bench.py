"""What the stages share: time that is left, rows of results, and calls that are compared with each other."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import harness
import torch
from harness import Timed, alternate, pick_device, provenance, ratio_spread, spread

from .table import Row, append_row


class _Enqueued:
    """A call that notes how long the host took for it."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call, self.seconds = call, []

    def __call__(self) -> None:
        start = time.perf_counter()
        self._call()
        self.seconds.append(time.perf_counter() - start)


@dataclass(frozen=True)
class Bench:
    """A stage at work.

    Attributes:
        device: the GPU, or the CPU in a dry run.
        dry: sizes are to be tiny; graphs are calls.
        end: ``time.monotonic()`` by which the stage must be done.
        out: folder of the results.
    """

    stage: str
    device: torch.device
    dry: bool
    end: float
    path: Path
    shared: Row

    @classmethod
    def start(cls, stage: str, path: Path, seconds: float, dry: bool, shared: Row) -> Bench:
        """Pick the device, and note where numbers come from.

        Raises:
            RuntimeError: there is no GPU, and this is no dry run.
        """
        end = time.monotonic() + seconds - min(3.0, seconds / 10)
        if not dry and not torch.cuda.is_available():
            raise RuntimeError("no GPU that torch can use; --dry tries this command on a CPU")
        device = torch.device("cpu") if dry else pick_device()
        if dry:
            harness.MINIMUM_SAMPLE_SECONDS, harness.WARM_UP_CALLS = 1e-6, 0
        return cls(stage, device, dry, end, path, {**shared, **provenance(device)})

    @property
    def out(self) -> Path:
        return self.path.parent

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    @property
    def half(self) -> torch.dtype:
        """bf16; fp16 in a dry run, because Triton's interpreter computes wrongly in bf16."""
        return torch.float16 if self.dry else torch.bfloat16

    @property
    def copies(self) -> int:
        """Copies of the tensors that take turns in ``rotated``: more than an L2 cache holds, at a layer's sizes."""
        return 1 if self.dry else 4

    def size(self, *full: int) -> tuple[int, ...]:
        """Sizes, or tiny ones that keep their order in a dry run."""
        return tuple(max(24, each // 128) for each in full) if self.dry else full

    def emit(self, **row: object) -> None:
        """Append a row, and print it."""
        append_row(self.path, {"stage": self.stage, **row, **self.shared})
        print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)

    @contextmanager
    def attempt(self, **labels: object) -> Iterator[None]:
        """What is raised inside becomes a row. Re-raised where the GPU's context is lost: nothing after it counts."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.emit(**labels, error=f"{type(error).__name__}: {error}"[:500])
            if self.device.type == "cuda":
                torch.cuda.synchronize()  # raises again if the error stays
                torch.cuda.empty_cache()

    def graphed(self, call: Callable[[], object]) -> Callable[[], object]:
        """``call`` as the replay of a CUDA graph; itself in a dry run."""
        if self.device.type != "cuda":
            return call
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles, tunes and allocates
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def rotated(self, call: Callable[[int], object]) -> Callable[[], object]:
        """A graph of ``call(0) .. call(copies - 1)``, each on tensors of its own."""

        def all_copies() -> None:
            for copy in range(self.copies):
                call(copy)

        return self.graphed(all_copies)

    def compare(
        self,
        calls: Mapping[str, Timed],
        *,
        key: str,
        baseline: str | None = None,
        rotated: bool = False,
        rounds: int = 30,
        seconds: float = 4.0,
        **labels: object,
    ) -> dict[str, float]:
        """Time calls that take turns; a row each, and their medians in microseconds.

        Args:
            calls: what to time, by name.
            key: the column that the names go to.
            baseline: the call that ``ratio`` is over; None: no ratio.
            rotated: the calls come from ``rotated``: each does what is timed ``copies`` times.
            seconds: no further round starts after so long.
        """
        if not calls:
            return {}
        per_call = self.copies if rotated else 1
        host = {name: _Enqueued(timed.call) for name, timed in calls.items()}
        samples = alternate(
            {name: Timed(host[name], timed.backend) for name, timed in calls.items()},
            1 if self.dry else rounds,
            self.device,
            budget=max(0.0, min(seconds, self.left)),
        )
        medians = {}
        for name, taken in samples.items():
            found = spread(taken)
            row: Row = {key: name, **labels, "rounds": len(taken)}
            for column, value in (("us", found.median), ("us_low", found.low), ("us_high", found.high)):
                row[column] = 1e6 * value / per_call
            row["host_us"] = 1e6 * spread(host[name].seconds[-len(taken) :]).median / per_call
            if baseline is not None:
                ratio = ratio_spread(taken, samples[baseline])
                row |= {"ratio": ratio.median, "ratio_low": ratio.low, "ratio_high": ratio.high}
            medians[name] = 1e6 * found.median / per_call
            if "tokens" in labels:
                row["tokens_per_s"] = float(str(labels["tokens"])) * per_call / found.median
            self.emit(**row)
        return medians


def program(statement: str) -> list[str]:
    """A command that runs a statement with the stages importable."""
    folder = str(Path(__file__).parents[1])
    return [sys.executable, "-c", f"import sys; sys.path.insert(0, {folder!r}); {statement}"]


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Variables of the process, set inside."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
