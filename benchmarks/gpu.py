"""Everything that a GPU can tell, in one command that keeps its budget.

    python benchmarks/gpu.py --minutes 8 --out runs/gpu           # on a machine with a GPU
    python benchmarks/gpu.py --minutes 3 --stages layers,steps    # some stages alone
    python benchmarks/gpu.py --dry --out runs/dry                 # on a CPU: tiny sizes, times that mean nothing
    python benchmarks/carry.py                                    # beforehand: fetch what a bare machine lacks

Stages run in order of worth, each in a process of its own with its own time limit: a crash, a hang or a slow
compilation costs that stage alone. Time that a stage leaves goes to those after it. Nothing needs to be installed but
torch, Triton and transformers; PEFT comes from ``carry/`` if that is there.

``OUT/gpu.jsonl`` gets a line of JSON for every result as it comes, with device, versions and commit; a row holds
``error`` where something could not be measured. ``OUT/NAME.log`` is what a stage printed as errors, ``OUT/clocks.csv``
the clocks, ``OUT/summary.md`` the table that is printed last.

GPU time is the median between CUDA events around an eager call or the replay of a CUDA graph, after a read that fills
the L2 cache; everything that is compared takes turns in one process. ``host_us`` is how long the host took to enqueue.
Exit status: 0; 1 if a stage failed, was stopped, or found something wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "speed"))

from gpu_stages import STAGES, Stage
from gpu_stages.table import PROVENANCE, Row, append_row, read_rows, summary

ROOT = Path(__file__).resolve().parents[1]
CARRIED = ROOT / "carry"
FILE = "gpu.jsonl"
#: Seconds kept for the table and for processes that are slow to die, and those below which no stage starts.
RESERVE, LEAST = 5.0, 8.0

#: Stage -> the command of its process.
Commands = Callable[[Stage], list[str]]


class Child:
    """A stage's process: it imports what it needs, and begins when it is told how many seconds it has."""

    def __init__(self, stage: Stage, command: Sequence[str], out: Path, extra: dict[str, str]) -> None:
        self.stage = stage
        self.log = out / f"{stage.name}.log"
        paths = [*([str(CARRIED)] if CARRIED.is_dir() else []), str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, **extra, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stderr=log, env=environment, start_new_session=True, text=True
            )

    def begin(self, seconds: float) -> None:
        """Say how many seconds there are."""
        self.began, self.limit = time.monotonic(), seconds
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has died; ``finish`` tells
            self._process.stdin.write(f"{seconds}\n")
            self._process.stdin.close()

    def finish(self) -> Row:
        """Wait until it ends or its time is over; what became of it."""
        try:
            code = self._process.wait(max(0.0, self.limit - (time.monotonic() - self.began)))
            status = "ok" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            status = "stopped"
        self.kill()
        row: Row = {"stage": self.stage.name, "what": "stage", "status": status}
        row |= {"seconds": round(time.monotonic() - self.began, 1), "limit": round(self.limit, 1)}
        if status != "ok":
            row["error"] = self.log.read_text(errors="replace")[-1500:].strip() or "no message"
        return row

    def kill(self) -> None:
        """End it and whatever it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process may be stuck in the driver
            self._process.wait(2)


class Clocks:
    """Clocks and power, noted twice a second by nvidia-smi where there is one."""

    QUERY = "timestamp,clocks.sm,clocks.mem,power.draw,temperature.gpu"

    def __init__(self, path: Path) -> None:
        self.path, self._process = path, None
        if command := shutil.which("nvidia-smi"):
            with path.open("w") as file:
                options = [f"--query-gpu={self.QUERY}", "--format=csv,noheader,nounits", "-lms", "500"]
                self._process = subprocess.Popen([command, *options], stdout=file, stderr=subprocess.DEVNULL)
        self._seen = 0

    def since_last(self) -> Row:
        """Medians over the samples since the last call."""
        if self._process is None:
            return {}
        lines = self.path.read_text(errors="replace").splitlines()
        fresh, self._seen = lines[self._seen :], len(lines)
        columns = list(
            zip(*(line.split(", ") for line in fresh if line.count(",") == self.QUERY.count(",")), strict=True)
        )
        row: Row = {}
        for name, values in list(zip(self.QUERY.split(","), columns, strict=False))[1:]:
            numbers = sorted(float(value) for value in values if value.replace(".", "", 1).isdigit())
            if numbers:
                row[name] = numbers[len(numbers) // 2]
        return row

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def allowed(stage: Stage, later: Sequence[Stage], left: float) -> float:
    """The seconds of a stage: its share of what is left, so that every stage after it keeps its own."""
    weights = stage.seconds + sum(each.seconds for each in later if not each.beside)
    return left * stage.seconds / weights


def run_stages(stages: Sequence[Stage], commands: Commands, out: Path, minutes: float, shared: Row) -> None:
    """Run the stages within the budget; every row goes to ``out / FILE``, with ``shared`` in it."""
    end = time.monotonic() + 60 * minutes - RESERVE
    path, clocks, children = out / FILE, Clocks(out / "clocks.csv"), []
    provenance: Row = {}

    def note(row: Row) -> None:
        nonlocal provenance
        written = read_rows(path)
        provenance = next(({k: r[k] for k in PROVENANCE if k in r} for r in written if "device" in r), {})
        append_row(path, {**row, **clocks.since_last(), **shared, **provenance})
        print(f"== {row['stage']}: {row['status']}, {row['seconds']} of {row['limit']} s", flush=True)

    def start(stage: Stage) -> Child:
        extra = {"TRITON_INTERPRET": "1"} if shared.get("dry") and stage.interprets else {}
        children.append(Child(stage, commands(stage), out, extra))
        return children[-1]

    try:
        ready: dict[str, Child] = {}
        beside: list[Child] = []
        for place, stage in enumerate(stages):
            later, left = stages[place + 1 :], end - time.monotonic()
            if left < LEAST:
                print(f"== {stage.name}: not started, the time is over", flush=True)
                note({"stage": stage.name, "what": "stage", "status": "not started", "seconds": 0.0, "limit": 0.0})
                continue
            child = ready.pop(stage.name, None) or start(stage)
            print(f"== {stage.name}: {stage.title}", flush=True)
            if stage.beside:
                child.begin(min(stage.seconds, left))
                beside.append(child)
                continue
            child.begin(allowed(stage, later, left))
            if following := next((each for each in later if not each.beside), None):
                ready[following.name] = start(following)  # it imports meanwhile
            note(child.finish())
            while beside:
                note(beside.pop().finish())
        while beside:
            note(beside.pop().finish())
    finally:
        for child in children:
            child.kill()
        clocks.stop()


def child(name: str, out: Path, dry: bool, shared: Row) -> None:
    """The process of a stage."""
    module = importlib.import_module(f"gpu_stages.{name}")
    from gpu_stages.bench import Bench

    seconds = sys.stdin.readline()
    if seconds:  # else the command that started this has gone
        module.run(Bench.start(name, out / FILE, float(seconds), dry, shared))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="the budget, which is kept (default: 8)")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the results (default: runs/gpu)")
    names = ", ".join(f"{stage.name} ({stage.seconds:.0f} s: {stage.title})" for stage in STAGES)
    parser.add_argument("--stages", help=f"some of them, with commas: {names}")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU, to try the command itself")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    return parser


def chosen(text: str | None) -> list[Stage]:
    """The stages that ``--stages`` names, in their own order.

    Raises:
        ValueError: a name that no stage has.
    """
    names = [stage.name for stage in STAGES] if text is None else text.split(",")
    if unknown := [name for name in names if name not in {stage.name for stage in STAGES}]:
        allowed_names = ", ".join(stage.name for stage in STAGES)
        raise ValueError(f"stages must be out of {allowed_names}, got {', '.join(map(repr, unknown))}")
    return [stage for stage in STAGES if stage.name in names]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    out = options.out.resolve()
    shared: Row = {"run": options.run or time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    if options.dry:
        shared |= {"dry": True, "times": "a dry run on a CPU: they mean nothing"}
    if options.stage:
        child(options.stage, out, options.dry, shared)
        return 0
    try:
        stages = chosen(options.stages)
        if not 0 < options.minutes < float("inf"):
            raise ValueError(f"minutes must be above 0, got {options.minutes}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    again = [sys.executable, str(Path(__file__).resolve()), "--out", str(out), "--run", str(shared["run"])]
    again += ["--dry"] if options.dry else []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # processes are ended on the way out
    run_stages(stages, lambda stage: [*again, "--stage", stage.name], out, options.minutes, shared)
    rows = [row for row in read_rows(out / FILE) if row.get("run") == shared["run"]]
    table = summary(rows)
    (out / "summary.md").write_text(table)
    print(table)
    bad = [row for row in rows if (row.get("what") == "stage" and row["status"] != "ok") or row.get("right") is False]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
