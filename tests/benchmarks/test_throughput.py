"""The throughput benchmark: it refuses what is wrong, records everything, and draws from its CSV file alone."""

from __future__ import annotations

import contextlib
import csv
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import harness
import measure
import pytest
import throughput
import torch
from accuracy import Oracle, relative_error
from candidates import BUILDERS, build_candidate, title
from harness import Timed, alternate, forced_backend, pick_device, provenance, ratio_spread, spread
from measure import COLUMNS, Effort, measure_point
from memory import peak_bytes, saved_bytes
from problem import DTYPES, Point, build, pyramid, sample_count, shape_names
from throughput_report import markdown, plots, read_rows, write_rows

import ept_kernels
from ept_kernels import dispatch
from ept_kernels.backends import torch as torch_backend

CPU = torch.device("cpu")
#: 6 divides neither side, 8 only one.
TINY = Point("50x72", tokens=24, tasks=3, experts=8, dtype="fp32")
#: All but "compile", which takes a minute to compile; a test of its own compiles it once.
FAST = ("linear", "lora", "addmm", "lokr", "loop", "dense", "ept:torch", "ept:reference")
EFFORT = Effort(rounds=3, budget=60.0)
MB = 2**20


@pytest.fixture(autouse=True, scope="module")
def short_samples() -> Iterator[None]:
    """No test looks at how long anything took."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "MINIMUM_SAMPLE_SECONDS", 1e-5)
        yield


@pytest.fixture(scope="module")
def rows() -> list[measure.Row]:
    return measure_point(TINY, CPU, FAST, EFFORT, provenance(CPU))


@pytest.fixture
def written(rows: list[measure.Row], tmp_path: Path) -> Path:
    path = tmp_path / "throughput.csv"
    write_rows(path, rows)
    return path


def by_key(rows: list[measure.Row]) -> dict[tuple[object, object], measure.Row]:
    return {(row["candidate"], row["pass"]): row for row in rows}


# --- every candidate computes what it claims --------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize(
    "point",
    [
        TINY,
        Point("33x65", tokens=7, tasks=1, experts=1, dtype="fp32"),
        Point("64x64", tokens=40, tasks=40, experts=5, dtype="fp32"),
        Point("96x48", tokens=9, tasks=2, experts=16, dtype="fp32"),
    ],
    ids=lambda point: f"{point.shape}-{point.tasks}tasks-{point.experts}experts",
)
def test_candidates_match_their_definition(name: str, point: Point) -> None:
    problem = build(point, CPU, seed=3)
    candidate, oracle = build_candidate(name, problem), Oracle(problem)
    with forced_backend(candidate.forced):
        for gradients in (False, True):
            verdict = oracle.judge(candidate, gradients)
            assert verdict.right, verdict


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("EPT_SLOW_TESTS") != "1", reason="compiles for a minute; EPT_SLOW_TESTS=1 runs it")
def test_compiled_form_matches_its_definition() -> None:
    problem = build(TINY, CPU)
    verdict = Oracle(problem).judge(build_candidate("compile", problem), gradients=True)
    assert verdict.right, verdict


@pytest.mark.parametrize("point", [TINY, Point("33x65", 14, 1, 5, "fp32")], ids=["mixed", "one task"])
def test_uncompiled_structured_form_matches_its_definition(point: Point, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    problem = build(point, CPU)
    verdict = Oracle(problem).judge(build_candidate("compile", problem), gradients=True)
    assert verdict.right, verdict


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["linear", "lora", "lokr", "dense"])
def test_half_candidates_are_judged_by_plain_torch(name: str, dtype: str) -> None:
    problem = build(Point("50x72", 24, 3, 8, dtype), CPU)
    verdict = Oracle(problem).judge(build_candidate(name, problem), gradients=True)
    assert verdict.right, verdict
    assert 1e-5 < verdict.limit < 0.1


def test_all_ept_candidates_share_one_definition() -> None:
    """The definition is the dense update of every task: the layer's own, in float64."""
    problem = build(TINY, CPU)
    candidate = build_candidate("loop", problem)
    layer = problem.layer.double()
    leaves = {name: [tensor.detach().double() for tensor in tensors] for name, tensors in candidate.leaves.items()}
    x = problem.x.detach().double()
    exact = candidate.definition(x, layer.weight, leaves)
    for sample, task in enumerate(problem.task_of_sample):
        expected = x[sample] @ (layer.weight + layer.delta_weight(task)).T
        assert relative_error(exact[sample], expected) < 1e-6  # gates are the fp32 ones


def test_no_adapter_is_a_no_op() -> None:
    """An adapter that adds nothing would hide every error."""
    problem = build(TINY, CPU)
    plain = problem.base(problem.x)
    for name in FAST[1:]:
        assert relative_error(build_candidate(name, problem).forward(problem.x), plain) > 0.1, name


# --- a wrong result gets no speed -------------------------------------------------------------------------------------


def _measured(names: list[str] = ["linear", "ept:torch", "ept:reference"]) -> dict:  # noqa: B006 (read only)
    return by_key(measure_point(TINY, CPU, names, EFFORT, provenance(CPU)))


def scale_outputs(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """The torch backend's forward, wrong by ``factor``."""
    right = torch_backend.forward

    def scaled(*args, **options):
        output = right(*args, **options)
        return output._replace(y=output.y * factor)

    monkeypatch.setattr(torch_backend, "forward", scaled)


@pytest.mark.parametrize("factor", [1.0001, float("nan")], ids=["a little off", "nan"])
def test_wrong_output_is_refused(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    scale_outputs(monkeypatch, factor)
    found = _measured()
    for which in measure.PASSES:
        row = found["ept:torch", which]
        assert row["status"] == measure.WRONG
        assert not any(row[name] for name in ("median_ms", "tokens_per_s", "ratio", "ratio_low", "ratio_high"))
        assert not row["error"] <= row["error_limit"]
        assert f"> {row['error_limit']:.2e}" in row["note"]
        assert found["ept:reference", which]["status"] == measure.OK


@pytest.mark.parametrize("place", range(4), ids=["x", "A", "B", "kernels"])
def test_wrong_gradient_is_refused_in_the_backward_pass_alone(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch_backend.backward

    def wrong(*args, **options):
        gradients = list(right(*args, **options))
        gradients[place] = gradients[place] * 1.001
        return tuple(gradients)

    monkeypatch.setattr(torch_backend, "backward", wrong)
    found = _measured()
    assert found["ept:torch", "forward"]["status"] == measure.OK
    row = found["ept:torch", "forward+backward"]
    assert (row["status"], row["ratio"]) == (measure.WRONG, "")
    assert row["worst_tensor"] == ("x", "A", "B", "kernels")[place]


def test_failing_backend_is_reported_and_the_others_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args, **options):
        raise NotImplementedError("no such tile\nand more")

    monkeypatch.setattr(torch_backend, "forward", broken)
    found = _measured()
    row = found["ept:torch", "forward"]
    assert (row["status"], row["note"], row["ratio"]) == (measure.FAILED, "NotImplementedError: no such tile", "")
    assert row["backend"] == "torch"
    assert found["ept:reference", "forward"]["status"] == measure.OK


def test_nothing_is_measured_against_a_wrong_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: forward(self, x) * 1.01)
    with pytest.raises(RuntimeError, match="frozen linear is wrong"):
        _measured(["linear"])


def test_command_prints_no_ratio_for_a_wrong_backend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scale_outputs(monkeypatch, 1.01)
    assert _command(tmp_path) == 1
    output = capsys.readouterr()
    (line,) = [line for line in output.out.splitlines() if line.startswith("| EPT (torch)")]
    cells = [cell.strip() for cell in line.split("|")[2:-1]]
    assert cells[0] == cells[2] == "refused"
    assert cells[1].startswith("error of y") and cells[3].startswith("error of")
    assert "wrong: ept:torch at 40x24" in output.err
    table = (tmp_path / "throughput.md").read_text()
    assert line in table


# --- rows, table, plots -----------------------------------------------------------------------------------------------


def test_rows_are_complete(rows: list[measure.Row]) -> None:
    assert len(rows) == len(FAST) * len(measure.PASSES)
    for row in rows:
        assert tuple(row) == COLUMNS
        empty = {name for name in COLUMNS if row[name] == ""}
        assert empty == ({"note", "saved_bytes"} if row["pass"] == "forward" else {"note"}), row["candidate"]
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert row["low_ms"] <= row["median_ms"] <= row["high_ms"]
        assert row["tokens_per_s"] == pytest.approx(24 / row["median_ms"] * 1e3)
        assert row["error"] <= row["error_limit"] == 1e-5
        assert row["rounds"] == 3
    found = by_key(rows)
    assert {found["linear", which]["ratio"] for which in measure.PASSES} == {1.0}
    row = found["ept:torch", "forward"]
    assert (row["in_features"], row["out_features"], row["kernel_sizes"]) == (50, 72, "2 2 4 4 6 6 8 8")
    assert (row["tokens"], row["samples"], row["tasks"], row["dtype"], row["backend"]) == (24, 8, 3, "fp32", "torch")
    assert row["torch"] == torch.__version__
    assert 8 * 2 <= row["columns"] <= 8 * (6 + 8)


def test_csv_round_trip(written: Path, rows: list[measure.Row]) -> None:
    with written.open(newline="") as file:
        assert tuple(next(csv.reader(file))) == COLUMNS
    write_rows(written, rows)  # a later point goes to the same file, without a second header
    back = read_rows(written)
    assert len(back) == 2 * len(rows)
    assert back[0] == {name: str(value) for name, value in rows[0].items()}


def test_broken_csv_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "some.csv"
    assert throughput.main(["--plot", str(path), "--output", str(tmp_path)]) == 2
    assert "some.csv" in capsys.readouterr().err
    path.write_text("device,ratio\ncpu,1\n")
    with pytest.raises(ValueError, match="lacks the columns"):
        read_rows(path)
    path.write_text(",".join(COLUMNS) + "\n")
    with pytest.raises(ValueError, match="has no rows"):
        read_rows(path)


def test_plots_need_the_csv_alone(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = tmp_path / "elsewhere" / "results.csv"
    alone.parent.mkdir()
    shutil.move(written, alone)
    monkeypatch.setattr(throughput, "measure_point", None)  # nothing may be measured again
    monkeypatch.setattr(throughput, "pick_device", None)
    assert throughput.main(["--plot", str(alone), "--output", str(tmp_path / "drawn")]) == 0
    drawn = {path.name for path in (tmp_path / "drawn").iterdir()}
    assert drawn == {"ratio.png", "memory.png", "throughput.md"}


def test_every_axis_that_varies_is_drawn(rows: list[measure.Row], tmp_path: Path) -> None:
    path = tmp_path / "several.csv"
    write_rows(path, rows)
    for axis, value in (("tokens", 48), ("tasks", 1), ("experts", 16), ("shape", "9x9"), ("dtype", "bf16")):
        write_rows(path, [{**row, axis: value} for row in rows])
    drawn = {file.name for file in plots(path, tmp_path)}
    assert drawn == {f"ratio_by_{axis}.png" for axis in ("tokens", "tasks", "experts", "shape", "dtype")} | {
        "ratio.png",
        "memory.png",
    }
    assert all((tmp_path / name).stat().st_size > 5000 for name in drawn)


def test_plots_leave_refused_rows_out(rows: list[measure.Row], tmp_path: Path) -> None:
    path = tmp_path / "wrong.csv"
    write_rows(path, [{**row, "status": measure.WRONG, "ratio": ""} for row in rows])
    with pytest.raises(ValueError, match="no row with a time"):
        plots(path, tmp_path)


def test_markdown_has_a_line_for_each_candidate(written: Path) -> None:
    table = markdown(read_rows(written))
    for name in ("frozen nn.Linear", "PEFT LoRA r=8", "PEFT LoKr r=8", "EPT, expert by expert", "EPT (torch)"):
        (line,) = [line for line in table.splitlines() if line.startswith(f"| {name} |")]
        assert line.count("|") == 9
    assert "1.00 (1.00 to 1.00)" in table
    assert torch.__version__ in table and "50 to 72" in table


# --- the command ------------------------------------------------------------------------------------------------------


def _command(folder: Path, *more: str) -> int:
    arguments = ["--quick", "--shapes", "40x24", "--tokens", "16", "--tasks", "2", "--experts", "3", "--device", "cpu"]
    names = ["--candidates", "linear,lora,ept", "--backends", "torch", "--rounds", "2", "--output", str(folder)]
    return throughput.main([*arguments, *names, *more])


def test_quick_run_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _command(tmp_path) == 0
    output = capsys.readouterr()
    rows = read_rows(tmp_path / "throughput.csv")
    assert {row["candidate"] for row in rows} == {"linear", "lora", "ept:torch"}
    assert {row["status"] for row in rows} == {"ok"}
    assert {path.name for path in tmp_path.iterdir()} == {"throughput.csv", "throughput.md", "ratio.png", "memory.png"}
    assert (tmp_path / "throughput.md").read_text() in output.out
    assert "CPU" in output.err


def test_a_second_run_replaces_the_first(tmp_path: Path) -> None:
    assert _command(tmp_path) == _command(tmp_path) == 0
    assert len(read_rows(tmp_path / "throughput.csv")) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "t6"], "shapes must be out of t5-base.q"),
        (["--tokens", "0"], "tokens must be integers >= 1"),
        (["--tasks", "99", "--tokens", "7"], "tokens must be at least the number of tasks (99), got 7"),
        (["--dtype", "int8"], "dtype must be out of fp32, bf16, fp16, got 'int8'"),
        (["--backends", "nonsense"], "backends must be out of torch, reference, got 'nonsense'"),
        (["--candidates", "lora,x"], "got 'x'"),
        (["--rounds", "0"], "rounds must be at least 1, got 0"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_arguments_are_refused_before_work(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.setattr(ept_kernels, "available_backends", lambda *args: ("torch", "reference"))
    monkeypatch.setattr(throughput, "measure_point", None)
    assert throughput.main(["--output", str(tmp_path / "out"), "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def _plan(*arguments: str) -> list[tuple[Point, list[str]]]:
    return throughput.plan(throughput.parser().parse_args(arguments), CPU)[0]


def test_axes_are_swept_one_at_a_time_around_the_first_values() -> None:
    axes = ["--shapes", "8x8,9x9", "--tokens", "64,32", "--tasks", "2,1", "--experts", "8", "--dtype", "fp32,bf16"]
    points = [point for point, _ in _plan(*axes)]
    centre = Point("8x8", 64, 2, 8, "fp32")
    assert points[0] == centre
    assert len(points) == 5
    assert all(sum(getattr(p, a) != getattr(centre, a) for a in vars(centre)) <= 1 for p in points)
    assert len(_plan(*axes, "--cross")) == 16


def test_every_backend_that_can_serve_is_measured_but_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def available(device, dtype):
        asked.append((device, dtype))
        return ("triton", "cpu", "torch", "reference")

    monkeypatch.setattr(ept_kernels, "available_backends", available)
    names = _plan("--shapes", "8x8", "--tokens", "8", "--tasks", "1", "--experts", "8", "--dtype", "bf16")[0][1]
    assert names == [*BUILDERS, "ept:triton", "ept:cpu", "ept:torch"]
    assert asked == [(CPU, torch.bfloat16)]
    assert _plan("--quick", "--backends", "reference")[0][1][-1] == "ept:reference"
    assert "compile" not in _plan("--quick")[0][1]
    assert "compile" in _plan("--quick", "--candidates", "compile")[0][1]


def test_tritons_plans_stand_side_by_side_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ept_kernels, "available_backends", lambda device, dtype: ("triton", "cuda", "torch"))
    plans = ["ept:triton:library", "ept:triton:fused"]

    def names(device: str, *arguments: str) -> list[str]:
        options = throughput.parser().parse_args(["--candidates", "linear,ept", *arguments])
        return throughput.candidate_names(options, torch.device(device), "bf16")

    assert names("cuda") == ["linear", "ept:triton", "ept:cuda", "ept:torch", *plans]
    assert names("cpu") == ["linear", "ept:triton", "ept:cuda", "ept:torch"]
    assert names("cuda", "--backends", "triton:library,torch") == ["linear", "ept:triton:library", "ept:torch"]
    with pytest.raises(ValueError, match="got 'triton:single'"):
        names("cuda", "--backends", "triton:single")
    assert title("ept:triton:library") == "EPT (triton, library)"


def test_a_plan_is_forced_and_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan's variable reaches forward and backward; the torch backend stands in for Triton's."""
    seen = set()
    right = torch_backend.forward

    def watched(*args, **options):
        seen.add((os.environ["EPT_BACKEND"], os.environ.get("EPT_GPU_PLAN")))
        return right(*args, **options)

    monkeypatch.setattr(torch_backend, "forward", watched)
    monkeypatch.setitem(dispatch._loaded, "triton", torch_backend)
    monkeypatch.setattr(dispatch, "_chosen", {})
    monkeypatch.setenv("EPT_GPU_PLAN", "fused")
    monkeypatch.setenv("EPT_TRITON_AUTOTUNE", "1")
    names = ["ept:triton", "ept:triton:library", "ept:torch"]
    found = by_key(measure_point(TINY, CPU, names, EFFORT, provenance(CPU)))
    assert os.environ["EPT_GPU_PLAN"] == "fused"
    assert seen == {("triton", "fused"), ("triton", "library"), ("torch", "fused")}
    for name, (backend, base) in zip(
        names, [("triton", "fused"), ("triton", "library"), ("torch", "none")], strict=True
    ):
        row = found[name, "forward+backward"]
        assert (row["status"], row["backend"], row["gpu_plan"]) == (measure.OK, backend, base)
        assert row["triton_autotune"] == "1"


def test_the_definition_holds_one_update_at_a_time() -> None:
    """What autograd keeps does not grow by a dense update for each task."""
    kept = {}
    for tasks in (2, 16):
        problem = build(Point("96x80", tokens=16, tasks=tasks, experts=8, dtype="fp32"), CPU)
        candidate = build_candidate("ept:torch", problem)
        known = [problem.base.weight, *problem.layer.parameters()]
        kept[tasks] = saved_bytes(lambda c=candidate, p=problem: c.definition(p.x, p.base.weight, c.leaves), known)
    assert kept[16] - kept[2] < 4 * 96 * 80


@pytest.mark.parametrize(
    ("load", "cpus", "words"), [("0.5", "2", "0.5 on 2 CPUs"), ("2.1", "2", "2.1 on 2 CPUs: noisy")]
)
def test_only_a_high_load_is_called_noisy(load: str, cpus: str, words: str, written: Path) -> None:
    table = markdown([{**row, "load": load, "cpus": cpus} for row in read_rows(written)])
    (heading,) = [line for line in table.splitlines() if line.startswith("**50x72**")]
    assert heading.endswith(f"load average {words}")


def test_defaults_cover_every_axis() -> None:
    for defaults in (throughput.CPU, throughput.GPU):
        axes = [f"--{axis}={getattr(defaults, axis)}" for axis in ("shapes", "tokens", "tasks", "experts", "dtype")]
        points = [point for point, _ in _plan(*axes)]
        for axis in ("shape", "tokens", "tasks", "experts"):
            assert len({getattr(point, axis) for point in points}) > 2, axis


# --- problems ---------------------------------------------------------------------------------------------------------


def test_shapes_by_name_model_and_size() -> None:
    assert shape_names("t5-base") == ["t5-base.q", "t5-base.wi", "t5-base.wo"]
    assert Point("llama2-7b.down", 1, 1, 1, "fp32").features == (11008, 4096)
    assert Point("7x9", 1, 1, 1, "fp32").features == (7, 9)
    for bad in ("", "0x3", "3x", "t5"):
        with pytest.raises(ValueError, match="shapes"):
            shape_names(bad)


def test_eight_experts_are_the_papers_pyramid() -> None:
    assert pyramid(8) == (2, 2, 4, 4, 6, 6, 8, 8)
    assert pyramid(1) == (2,)
    assert pyramid(5) == (2, 2, 4, 6, 8)


@pytest.mark.parametrize(
    ("tokens", "tasks", "samples"), [(512, 1, 8), (512, 12, 16), (7, 1, 7), (30, 4, 10), (5, 5, 5)]
)
def test_samples_divide_the_tokens_and_hold_every_task(tokens: int, tasks: int, samples: int) -> None:
    assert sample_count(tokens, tasks) == samples
    problem = build(Point("16x16", tokens, tasks, 4, "fp32"), CPU)
    assert problem.x.shape == (samples, tokens // samples, 16)
    assert set(problem.task_of_sample) == set(range(tasks))


# --- the harness ------------------------------------------------------------------------------------------------------


def test_quantiles() -> None:
    found = spread([float(n) for n in range(11)])
    assert (found.low, found.median, found.high) == pytest.approx((2, 5, 8))
    assert spread([3.0]).high == 3.0
    ratio = ratio_spread([2.0, 40.0, 6.0], [1.0, 20.0, 3.0])  # a slow round slows both
    assert (ratio.low, ratio.median, ratio.high) == pytest.approx((2, 2, 2))


def test_alternation_calls_everyone_once_a_round_under_its_backend() -> None:
    seen = []

    def record(name: str) -> None:
        seen.append((name, os.environ.get("EPT_BACKEND")))
        if name == "a":
            torch.randn(400, 400) @ torch.randn(400, 400)

    candidates = {"a": Timed(lambda: record("a")), "b": Timed(lambda: record("b"), "reference")}
    before = dict(os.environ)
    samples = alternate(candidates, 4, CPU)
    assert dict(os.environ) == before
    assert {name: len(times) for name, times in samples.items()} == {"a": 4, "b": 4}
    assert set(seen) == {("a", None), ("b", "reference")}
    with pytest.raises(ValueError, match="rounds"):
        alternate(candidates, 0, CPU)


def test_gpu_clock_flushes_and_waits_once_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logic, with stand-ins for the driver: flush, event, call, event; one wait, then the reading."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def elapsed_time(self, end: Event) -> float:
            log.append("read")
            return 2.5

    class Buffer:
        def sum(self) -> None:
            log.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    monkeypatch.setattr(torch, "zeros", lambda *size, **options: Buffer())
    samples = alternate({name: Timed(lambda: log.append("call")) for name in "ab"}, 2, torch.device("cuda"))
    one = ["flush", "event", "call", "event"]
    assert log[4:] == 2 * [*one, *one, "wait", "read", "read"]  # after two warm-up calls of each
    assert samples == {"a": [2.5e-3] * 2, "b": [2.5e-3] * 2}


def test_a_budget_stops_after_the_least_rounds() -> None:
    assert len(alternate({"a": Timed(lambda: None)}, 50, CPU, budget=0.0, minimum_rounds=2)["a"]) == 2


def test_forced_backend_restores_what_was_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPT_BACKEND", "torch")
    with forced_backend("reference"):
        assert os.environ["EPT_BACKEND"] == "reference"
    with contextlib.suppress(KeyError), forced_backend(None):
        raise KeyError
    assert os.environ["EPT_BACKEND"] == "torch"
    with forced_backend(None):
        assert "EPT_BACKEND" not in os.environ
    assert os.environ["EPT_BACKEND"] == "torch"


def test_saved_bytes_counts_storages_once_and_no_parameter() -> None:
    x, w = torch.randn(100, 50, requires_grad=True), torch.randn(50, 50, requires_grad=True)
    assert saved_bytes(lambda: x @ w, [w]) == x.nbytes
    assert saved_bytes(lambda: (x @ w) + (x @ w.T), [w]) == x.nbytes
    frozen = w.detach()
    assert saved_bytes(lambda: x @ frozen, [frozen]) == 0


def test_peak_bytes_sees_what_is_freed_again() -> None:
    x = torch.zeros(MB // 4)

    def call() -> torch.Tensor:
        middle = x + 1  # 1 MB
        result = middle + middle  # 2 MB
        del middle
        return result.sum()

    assert 2 * MB <= peak_bytes(call, CPU) < 2 * MB + 10_000
    assert peak_bytes(lambda: None, CPU) == 0


def test_ept_keeps_only_x_and_small_tensors(rows: list[measure.Row]) -> None:
    found = by_key(rows)
    assert found["linear", "forward+backward"]["saved_bytes"] == 0
    tokens, width, out, columns = 24, 50, 72, 8 * (2 + 4 + 6 + 8)
    kept = tokens * width + columns * (tokens + width + out)  # x, U, the interleaved factors
    saved = found["ept:torch", "forward+backward"]["saved_bytes"]
    assert 4 * kept <= saved < 4 * kept + 20_000, "and router, kernels, groups"


def test_dtypes_and_device() -> None:
    assert set(DTYPES) == {"fp32", "bf16", "fp16"}
    assert pick_device("cpu") == CPU
    assert pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_measures_on_a_gpu() -> None:
    device = pick_device()
    rows = measure_point(TINY, device, ("linear", "lora", "ept:torch"), EFFORT, provenance(device))
    assert {row["status"] for row in rows} == {measure.OK}
    assert all(row["peak_bytes"] > 0 and row["timing"] == "CUDA events, L2 flushed" for row in rows)
