"""The roofline model against numbers derived by hand, and what must hold of any such model."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import roofline
from roofline_designs import DESIGNS, PASSES, active_sets, estimate
from roofline_devices import ACCELERATORS, Accelerator
from roofline_model import (
    Launch,
    Tiles,
    Work,
    expand,
    gemm,
    gemm_expand,
    gemm_shrink_expand,
    pow2,
    reduce_gradients,
    seed_gradients,
    shrink,
    shrink_gradient,
)

from ept_kernels import PyramidGeometry

H100 = ACCELERATORS["h100"]
PYRAMID = (2, 2, 4, 4, 6, 6, 8, 8)
EPT = ("unfused", "two-launches", "one-launch")

#: Small enough to count on paper: 6 does not divide 100, 8 does not divide 100 or 60.
SMALL = Work(10, PyramidGeometry(100, 60, 8, PYRAMID), (6, 8), tasks=3, row_block=4, splits=2)
TARGET = Work(8192, PyramidGeometry(4096, 4096, 8, PYRAMID), (6, 8))


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_columns_of_the_small_layer() -> None:
    assert SMALL.shrunk == 8 * (6 + 8)
    assert SMALL.columns == 8 * (8 + 8)  # 6 is padded to 8
    assert replace(SMALL, padding="none").columns == 112
    assert SMALL.core_flops == 2 * 10 * 8 * (64 + 64)
    assert [pow2(n) for n in (1, 2, 3, 8, 9)] == [1, 2, 4, 8, 16]


def test_shrink_of_the_small_layer() -> None:
    launch = shrink(SMALL, keep_u=True)
    # bf16 rows; ceil(100 / 6) = 17 columns of A for scale 6, which cover the 13 of scale 8; fp32 parameters
    folded, groups = 3 * (36 + 64) * 4, 3 * 4  # three tasks; ceil(10 / 4) row blocks
    assert launch.reads == {"x": 10 * 100 * 2, "A": 8 * 17 * 4, "folded": folded, "groups": groups}
    assert launch.writes == {"U": 10 * 112 * 2, "V": 10 * 160 * 2}  # zeros for the scales 2 and 4
    assert launch.flops == 2 * 10 * 100 * 128 + SMALL.core_flops


def test_shrink_grid_of_the_small_layer() -> None:
    """Three programs of 4 rows: x once, every scale's slice of A and the group's kernels for each of them."""
    launch = shrink(SMALL, Tiles(4, 128))
    assert launch.reads["x"] == 2000
    assert launch.reads["A"] == 3 * 8 * (17 + 13) * 4
    assert launch.reads["folded"] == 3 * (36 + 64) * 4
    assert launch.writes == {"V": 3200}


def test_gemm_grid_of_the_small_layer() -> None:
    """3 x 2 programs of 4 x 32: x once for each of 2 columns, W once for each of 3 rows."""
    launch = gemm_expand(SMALL, Tiles(4, 32))
    assert launch.reads["x"] == 2 * 2000
    assert launch.reads["W"] == 3 * 100 * 60 * 2
    assert launch.reads["V"] == 2 * 2240
    assert launch.reads["B"] == 3 * 8 * (10 + 8) * 4  # ceil(60 / 6), ceil(60 / 8)
    assert launch.writes == {"y": 10 * 60 * 2}
    assert launch.flops == 2 * 10 * 100 * 60 + 2 * 10 * 128 * 60
    fused = gemm_shrink_expand(SMALL, Tiles(4, 32))
    assert fused.reads["x"] == (2 + 4) * 2000  # 128 more columns are 4 more tiles
    assert fused.writes == {"V": 3200, "y": 1200}


def test_gradients_of_the_small_layer() -> None:
    launch = shrink_gradient(SMALL)
    assert launch.reads["dy"] == 1200 and launch.reads["U"] == 2240
    assert launch.reads["B"] == 8 * 10 * 4
    assert launch.writes == {"dU": 3200, "dfolded partials": 3 * 100 * 4}
    seeds = seed_gradients(SMALL, Tiles(4, 32))
    assert seeds.reads == {"x": 2000, "dU": 4 * 2240, "dy": 1200, "V": 2 * 2240}
    assert seeds.writes == {"dA partials": 2 * 8 * 4 * 100 * 4, "dB partials": 2 * 8 * 4 * 60 * 4}  # of all four scales
    assert seeds.flops == 2 * 10 * (8 * (2 + 4 + 8 + 8)) * (100 + 60)
    last = reduce_gradients(SMALL)
    assert last.reads == {**seeds.writes, "dfolded partials": 1200}
    assert last.writes == {"dA": 8 * 50 * 4, "dB": 8 * 30 * 4, "dfolded": 3 * (4 + 16 + 36 + 64) * 4}


def test_backward_base_reads_what_it_must() -> None:
    launch = gemm_expand(SMALL, backward=True)
    assert launch.reads == {"dy": 1200, "W": 12000, "dU": 2240, "A": 8 * 17 * 4}
    assert launch.writes == {"dx": 2000}
    assert expand(SMALL, backward=True).reads == {"dx": 2000, "dU": 2240, "A": 8 * 17 * 4}


def test_target_shape_on_h100() -> None:
    """2 * 8192 * 4096^2 FLOPs at 989.4 TFLOP/s; 64 MiB of x or y at 3.35 TB/s; 128 columns are 1/32 of 4096."""
    base = 2 * 8192 * 4096**2 / 989.4e12
    assert estimate("linear", TARGET, H100).seconds["forward"] == pytest.approx(base)
    x, v, small = 8192 * 4096 * 2, 8192 * 160 * 2, 8 * 683 * 4 + 100 * 4 + 128 * 4
    two = base * (1 + 1 / 32) + (x + v + small) / 3.35e12
    assert estimate("two-launches", TARGET, H100).seconds["forward"] == pytest.approx(two)
    core = 2 * 8192 * 8 * 128 / 989.4e12
    one = estimate("one-launch", TARGET, H100)
    assert one.seconds["forward"] == pytest.approx(base * (1 + 2 / 32) + core)
    assert one.ratios["forward"] == pytest.approx(1 + 2 / 32 + core / base)


def test_lora_on_the_target_shape() -> None:
    """x read, y read and written, 8 columns: bandwidth alone."""
    base = 2 * 8192 * 4096**2 / 989.4e12
    x, u, factor = 8192 * 4096 * 2, 8192 * 8 * 2, 8 * 4096 * 2
    expected = base + (x + factor + u + u + factor + 2 * x) / 3.35e12
    assert estimate("lora", TARGET, H100).seconds["forward"] == pytest.approx(expected)
    eager = base + (x + factor + u + u + factor + x + 2 * x + 3 * x) / 3.35e12
    assert estimate("lora-peft", TARGET, H100).seconds["forward"] == pytest.approx(eager)


def test_lora_flops_do_not_depend_on_which_tensor_is_largest() -> None:
    work = replace(SMALL, tokens=1)  # x is smaller than A here
    by_name = {launch.name: launch.flops for launch in estimate("lora", work, H100).backward}
    assert by_name["dy B"] == by_name["dy u"] == 2 * 8 * 60
    assert by_name["x du"] == by_name["du A"] == 2 * 8 * 100


# --- what holds of any work -------------------------------------------------------------------------------------------

WORKS = {
    "target": TARGET,
    "small": SMALL,
    "one token": replace(TARGET, tokens=1),
    "wide": Work(2048, PyramidGeometry(768, 3072, 8, PYRAMID), (2, 8), "fp32"),
    "tf32": Work(777, PyramidGeometry(769, 1001, 16, (3, 5, 7)), (3, 5, 7), "tf32", padding="none"),
}


@pytest.mark.parametrize("device", ACCELERATORS.values(), ids=ACCELERATORS)
@pytest.mark.parametrize("work", WORKS.values(), ids=WORKS)
def test_order_of_designs(work: Work, device: Accelerator) -> None:
    for which in PASSES:
        floor = {name: estimate(name, work, device).seconds[which] for name in DESIGNS}
        order = ["linear", "bound", "overlapped", "two-launches", "unfused"]
        for names in (order, ["bound", "one-launch", "two-launches"], ["linear", "lora", "lora-peft"]):
            for lower, higher in itertools.pairwise(names):
                assert floor[lower] <= floor[higher] * (1 + 1e-12), (which, lower, higher)


@pytest.mark.parametrize("name", DESIGNS)
@pytest.mark.parametrize(
    "larger",
    [
        replace(TARGET, tokens=8193),
        replace(TARGET, geometry=PyramidGeometry(4104, 4096, 8, PYRAMID)),
        replace(TARGET, geometry=PyramidGeometry(4096, 4104, 8, PYRAMID)),
        replace(TARGET, geometry=PyramidGeometry(4096, 4096, 9, PYRAMID)),
        replace(TARGET, active=(4, 6, 8)),
        replace(TARGET, dtype="tf32"),
        replace(TARGET, tasks=9),
    ],
    ids=["tokens", "in", "out", "rank", "active", "dtype", "tasks"],
)
def test_more_work_never_costs_less(name: str, larger: Work) -> None:
    small, large = estimate(name, TARGET, H100), estimate(name, larger, H100)
    assert all(small.seconds[which] <= large.seconds[which] for which in PASSES)


@pytest.mark.parametrize("name", EPT)
def test_tiles_only_add_reads(name: str) -> None:
    """A grid re-reads operands; it never reads less than every tensor once, and writes the same."""
    for build in (gemm, shrink, shrink_gradient, gemm_expand, expand, gemm_shrink_expand, seed_gradients):
        once, tiled = build(TARGET), build(TARGET, Tiles(128, 256))
        assert once.reads.keys() == tiled.reads.keys()
        assert all(once.reads[tensor] <= tiled.reads[tensor] for tensor in once.reads if tensor != "groups"), build
        assert {k: v for k, v in once.writes.items() if "partials" not in k} == {
            k: v for k, v in tiled.writes.items() if "partials" not in k
        }


def test_one_tile_is_no_tiling() -> None:
    for build in (gemm, gemm_expand, expand, seed_gradients):
        once, tiled = build(SMALL), build(SMALL, Tiles(10, 100))
        for tensor in set(once.reads) - {"A", "B"}:
            assert once.reads[tensor] == tiled.reads[tensor], (build, tensor)


@pytest.mark.parametrize("device", ACCELERATORS.values(), ids=ACCELERATORS)
def test_overhead_of_one_launch_vanishes_as_the_layer_grows(device: Accelerator) -> None:
    ratios = []
    for features in (1024, 4096, 16384, 65536):
        work = replace(TARGET, tokens=features, geometry=PyramidGeometry(features, features, 8, PYRAMID))
        ratios.append(estimate("one-launch", work, device).ratios["forward"])
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[-1] < 1.01


def test_with_unlimited_bandwidth_only_flops_count() -> None:
    device = Accelerator("compute alone", H100.rates, 1e30)
    for name in ("two-launches", "one-launch", "unfused"):
        found = estimate(name, TARGET, device)
        flops = sum(launch.flops for launch in found.forward)
        assert found.seconds["forward"] == pytest.approx(flops / 989.4e12)
    assert estimate("two-launches", TARGET, device).seconds == pytest.approx(
        estimate("unfused", TARGET, device).seconds
    )


def test_overlapped_is_the_larger_sum() -> None:
    found = estimate("overlapped", TARGET, H100)
    flops, moved = (sum(getattr(launch, name) for launch in found.backward) for name in ("flops", "bytes"))
    assert found.backward == estimate("two-launches", TARGET, H100).backward
    assert found.seconds["backward"] == pytest.approx(max(flops / 989.4e12, moved / 3.35e12))
    assert found.seconds["backward"] == pytest.approx(flops / 989.4e12)  # compute-bound at this size


def test_with_unlimited_rate_only_bytes_count() -> None:
    device = Accelerator("memory alone", dict.fromkeys(H100.rates, 1e30), 1e12)
    for name in DESIGNS:
        found = estimate(name, TARGET, device)
        assert found.seconds["forward"] == pytest.approx(sum(launch.bytes for launch in found.forward) / 1e12)


def test_floor_of_a_launch_is_the_larger_of_the_two() -> None:
    launch = Launch("any", {"a": 3_000}, {"b": 350}, flops=0)
    assert launch.floor(H100, "bf16") == pytest.approx(3350 / 3.35e12)
    assert replace(launch, flops=10**9).floor(H100, "fp32") == pytest.approx(10**9 / 66.9e12)


@pytest.mark.parametrize("name", EPT)
def test_launch_counts_are_those_promised(name: str) -> None:
    found = estimate(name, TARGET, H100)
    assert len(found.forward) <= (3 if name == "unfused" else 2)
    assert len(found.backward) <= (6 if name == "unfused" else 5)


def test_a_sequence_writes_what_its_later_launches_read() -> None:
    given = {"x", "W", "A", "B", "folded", "groups", "dy"}
    for name in EPT:
        found = estimate(name, TARGET, H100)
        for launches in (found.forward, found.backward):
            known = dict.fromkeys(given)
            for launch in launches:
                assert launch.reads.keys() <= known.keys() | launch.writes.keys(), (name, launch.name)
                for tensor, size in launch.reads.items():
                    written = known.get(tensor) or size
                    assert size == written or (tensor in ("V", "dU") and size < written), (name, launch.name, tensor)
                known.update(launch.writes)


# --- choices of experts -----------------------------------------------------------------------------------------------


def test_active_sets_of_the_default_pyramid() -> None:
    """28 pairs of 8 experts: one for each of 4 equal pairs, four for each of 6 mixed ones."""
    sets = active_sets(PYRAMID, 2)
    assert len(sets) == 10
    assert sum(sets.values()) == pytest.approx(1)
    assert sets[2,] == pytest.approx(1 / 28) and sets[2, 8] == pytest.approx(4 / 28)
    assert list(sets)[-1] == (6, 8)
    with pytest.raises(ValueError, match="top_k"):
        active_sets(PYRAMID, 9)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokens", 0),
        ("splits", True),
        ("active", ()),
        ("active", (3,)),
        ("active", (8, 8)),
        ("dtype", "int8"),
        ("padding", "x"),
    ],
)
def test_bad_work_names_the_argument(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        replace(TARGET, **{field: value})


# --- the command ------------------------------------------------------------------------------------------------------


def test_json_holds_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    status = roofline.main(["--json", "--device", "a100", "--tokens", "512"])
    content = json.loads(capsys.readouterr().out)
    (device,) = content["devices"]
    work = replace(TARGET, tokens=512)
    for name, design in device["designs"].items():
        found = estimate(name, work, ACCELERATORS["a100"])
        assert design["ratios"] == pytest.approx(found.ratios)
        assert [launch["bytes"] for launch in design["backward"]] == [launch.bytes for launch in found.backward]
    assert status == (0 if content["verdict"]["met"] else 1)


@pytest.mark.parametrize(("active", "judge", "status"), [("2", "forward", 0), ("6,8", "forward", 1), ("2", "total", 1)])
def test_exit_status_says_whether_the_target_is_met(
    active: str, judge: str, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert roofline.main(["--device", "h100", "--active", active, "--judge", judge]) == status
    lines = capsys.readouterr().out
    assert ("met " in lines) == (status == 0)
    assert ("missed" in lines) == (status == 1)


def test_verdict_states_by_how_much_it_is_missed() -> None:
    estimates = {name: estimate(name, TARGET, H100) for name in DESIGNS}
    ((met, line),) = roofline.verdicts(H100, estimates, ["forward"])
    ratio = estimates["one-launch"].ratios["forward"]
    assert met == (ratio <= roofline.TARGET)
    assert f"misses it by {ratio - 1.05:.3f} ({ratio:.3f})" in line


def test_bad_argument_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert roofline.main(["--active", "3"]) == 2
    assert "active must be distinct scales out of (2, 4, 6, 8), got (3,)" in capsys.readouterr().err
