"""The native CPU backend beyond what every backend is tested for: each instruction set, threads, sizes, refusals."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from pyramid_testing import (
    GROUPINGS,
    Case,
    assert_all_match,
    assert_same_bits,
    poisoned_memory,
    relative_error,
)

import ept_kernels
from ept_kernels import PyramidGeometry, backend_for, reference
from ept_kernels.backends import cpu as cpu_backend

CPU = torch.device("cpu")
MISSING = cpu_backend.unsupported(CPU, torch.float32)
ROW_OPS = ("pyramid_delta", "pyramid_linear")
#: Every instruction set that any build can hold: one that is absent here is a skip that says so.
INSTRUCTION_SETS = ("avx512bf16", "avx512", "avx2", "portable")

needs_native = pytest.mark.skipif(MISSING is not None, reason=f"no native CPU backend: {MISSING}")


@pytest.fixture
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Forces the backend and, if given one, an instruction set."""
    if MISSING is not None:
        pytest.skip(f"no native CPU backend: {MISSING}")
    monkeypatch.setenv("EPT_BACKEND", "cpu")
    name, detected = getattr(request, "param", ""), cpu_backend.build_info()["cpu_detected"]
    if name and name not in detected:
        pytest.skip(f"{name} is not built or not on this processor, which has {', '.join(detected)}")
    before = cpu_backend.build_info()["cpu_selected"]
    cpu_backend.select_instruction_set(name)
    yield name
    cpu_backend.select_instruction_set(before)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


EVERY_SET = pytest.mark.parametrize("isa", INSTRUCTION_SETS, indirect=True)


def wide_case(rng: random.Random) -> Case:
    """Layers of several vectors and blocks of rows: scales beyond any vector, ranks of every remainder."""
    in_features, out_features = rng.randint(17, 150), rng.randint(17, 150)
    scales = tuple(rng.randint(1, min(in_features, out_features, 40)) for _ in range(rng.randint(1, 4)))
    grouping = rng.choice(GROUPINGS)
    return Case(
        PyramidGeometry(in_features, out_features, rng.choice((1, 2, 3, 7, 8, 11, 16)), scales),
        lead=(rng.randint(1, 4), rng.randint(1, 40)),
        grouping=grouping,
        num_groups=1 if grouping == "none" else rng.randint(1, 5),
        bias=rng.random() < 0.5,
        zero_scale=rng.random() < 0.5,
        seed=rng.randrange(1000),
    )


DEFAULT = PyramidGeometry(208, 150, 8, (2, 2, 4, 4, 6, 6, 8, 8))
#: Enough rows for several threads and for a last block that is not full.
LARGE = Case(DEFAULT, lead=(5, 83), grouping="sample", num_groups=3, zero_scale=True)


# --- values on every path ---------------------------------------------------------------------------------------------


@EVERY_SET
@pytest.mark.parametrize("op", ROW_OPS)
@pytest.mark.parametrize("seed", range(12))
def test_every_instruction_set_in_fp32(isa: str, op: str, seed: int) -> None:
    problem = wide_case(random.Random(seed)).tensors(torch.float32)
    truth = problem.evaluate(reference, op, dtype=torch.float64)
    assert_all_match(problem.evaluate(ept_kernels, op), truth, 1e-5)


@EVERY_SET
@pytest.mark.parametrize("op", ROW_OPS)
@pytest.mark.parametrize("seed", range(12))
def test_every_instruction_set_in_bf16(isa: str, op: str, seed: int) -> None:
    """No worse than twice the error of plain torch, which multiplies by the dense weight in bf16."""
    problem = wide_case(random.Random(seed)).tensors(torch.bfloat16, adapter_dtype=torch.float32)
    truth = problem.evaluate(reference, op, dtype=torch.float64)
    ours, plain = problem.evaluate(ept_kernels, op), problem.evaluate(reference, op)
    for name, value in ours.items():
        error, allowed = relative_error(value, truth[name]), 2 * relative_error(plain[name], truth[name])
        assert error <= allowed, f"{name}: error {error:.2e}, plain torch allows {allowed:.2e}"


@EVERY_SET
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_instruction_set_on_a_real_layer(isa: str, dtype: torch.dtype, threads: int) -> None:
    problem = LARGE.tensors(dtype, adapter_dtype=torch.float32)
    truth = problem.evaluate(reference, "pyramid_linear", dtype=torch.float64)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    results = problem.evaluate(ept_kernels, "pyramid_linear")
    assert_all_match(results, truth, tolerance)
    again = problem.evaluate(ept_kernels, "pyramid_linear")
    for name, value in results.items():
        assert_same_bits(value, again[name], f"{name} with {threads} threads")


@pytest.mark.parametrize("columns", [768, 769, 775, 783])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.usefixtures("isa")
def test_nothing_is_read_or_written_beyond_a_row(columns: int, dtype: torch.dtype) -> None:
    """Rows of x and of the gradient lie in a field of NaN; neighbours of the result must stay what they were."""
    geometry = PyramidGeometry(columns, columns - 7, 8, (2, 3, 6, 8, 20))
    p = Case(geometry, lead=(7,)).tensors(dtype, adapter_dtype=torch.float32)

    def embedded(tensor: torch.Tensor) -> torch.Tensor:
        field = tensor.new_full((tensor.shape[0] + 2, tensor.shape[1] + 64), torch.nan)
        field[1:-1, 32:-32] = tensor
        return field[1:-1, 32:-32]

    inside = replace(p, x=embedded(p.x), cotangent=embedded(p.cotangent))
    with poisoned_memory():
        results = inside.evaluate(ept_kernels, "pyramid_delta")
    for name, value in p.evaluate(ept_kernels, "pyramid_delta").items():
        assert_same_bits(results[name], value, name)


@pytest.mark.usefixtures("isa")
def test_kernels_at_zero_still_get_their_gradient() -> None:
    """A fresh layer: every folded kernel is zero, so no scale is active."""
    problem = LARGE.tensors(torch.float32)
    problem = replace(problem, folded=torch.zeros_like(problem.folded))
    truth = problem.evaluate(reference, "pyramid_delta", dtype=torch.float64)
    results = problem.evaluate(ept_kernels, "pyramid_delta")
    assert results["folded"].abs().min(dim=1).values.count_nonzero() == len(set(problem.groups.tolist()))
    assert_all_match(results, truth, 1e-5)


@pytest.mark.usefixtures("isa")
def test_a_row_of_nan_spoils_no_other() -> None:
    problem = LARGE.tensors(torch.float32)
    spoilt = problem.x.clone()
    spoilt[2, 3] = torch.nan
    clean, output = (
        replace(problem, x=x).evaluate(ept_kernels, "pyramid_linear", wanted=["x"]) for x in (problem.x, spoilt)
    )
    assert output["output"][2, 3].isnan().all()
    kept = torch.ones(5, 83, dtype=torch.bool)
    kept[2, 3] = False
    assert_same_bits(output["output"][kept], clean["output"][kept])
    assert_same_bits(output["x"], clean["x"], "the gradient of x does not depend on x")


@pytest.mark.usefixtures("isa")
def test_more_elements_than_32_bits_count() -> None:
    """Rows 2**20 apart, so that the last one begins beyond 2**31 elements; untouched memory costs nothing."""
    rows, stride = 2100, 1 << 20
    geometry = PyramidGeometry(40, 24, 8, (2, 8))
    x = torch.empty(rows * stride, dtype=torch.bfloat16).as_strided((rows, 40), (stride, 1))
    x[:-3] = 0
    p = Case(geometry, lead=(3,)).tensors(torch.bfloat16, adapter_dtype=torch.float32)
    x[-3:] = p.x
    output, *_ = torch.ops.ept.pyramid_delta(x, p.A, p.B, p.folded, None, 24, [2, 8])
    assert not output[:-3].any()
    assert_same_bits(output[-3:], p.call(ept_kernels, "pyramid_delta"))


@pytest.mark.usefixtures("isa")
def test_backward_does_no_more_than_asked() -> None:
    p = replace(LARGE, lead=(64,), grouping="row").tensors(torch.float32)
    call = p.for_backends()
    full = cpu_backend.backward(p.cotangent, call, None, [True] * 4)
    for mask in range(16):
        needs = [bool(mask >> i & 1) for i in range(4)]
        given = cpu_backend.backward(p.cotangent, call, None, needs)
        for need, gradient, expected in zip(needs, given, full, strict=True):
            assert (gradient is not None) == need
            if need:
                assert_same_bits(gradient, expected)


# --- choice and refusal -----------------------------------------------------------------------------------------------


@needs_native
def test_it_is_the_choice_on_a_cpu_for_the_dtypes_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EPT_BACKEND", raising=False)
    for dtype, name in {
        torch.float32: "cpu",
        torch.bfloat16: "cpu",
        torch.float64: "torch",
        torch.float16: "torch",
    }.items():
        assert backend_for(CPU, dtype).name == name, dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_forced_on_another_dtype_it_fails_loudly(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPT_BACKEND", "cpu")
    with pytest.raises(RuntimeError, match=f"EPT_BACKEND='cpu' cannot serve {dtype} on cpu: .* float32 and bfloat16"):
        backend_for(CPU, dtype)


def test_it_does_not_serve_other_devices() -> None:
    assert "not cuda" in cpu_backend.unsupported(torch.device("cuda"), torch.float32)


@needs_native
def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"instruction set 'mmx' is not built or not on this processor; allowed: .*portable"
    ):
        cpu_backend.select_instruction_set("mmx")


def run_python(program: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


REPORT = """
import torch
from ept_kernels import backend_for
from ept_kernels.backends import cpu as cpu_backend
print(backend_for(torch.device("cpu")).name, cpu_backend.unsupported(torch.device("cpu"), torch.float32))
"""


@needs_native
def test_the_environment_names_an_instruction_set() -> None:
    program = "from ept_kernels.backends import cpu; print(cpu.build_info()['cpu_selected'])"
    assert run_python(program, EPT_CPU_ISA="portable").strip() == "portable"
    assert run_python(REPORT, EPT_CPU_ISA="mmx", EPT_BACKEND="").startswith("torch EPT_CPU_ISA: instruction set 'mmx'")


def test_without_the_extension_torch_serves_and_the_reason_is_known() -> None:
    program = "import sys; sys.modules['ept_kernels._C'] = None" + REPORT
    assert run_python(program, EPT_BACKEND="").startswith("torch the compiled module is missing or does not load")


@needs_native
def test_a_torch_without_the_thread_pool_is_no_crash() -> None:
    program = "import ctypes, torch; ctypes.CDLL = lambda path: object()" + REPORT
    assert "has no C entry to its threads" in run_python(program, EPT_BACKEND="")


@needs_native
def test_build_info() -> None:
    info = cpu_backend.build_info()
    assert set(info) == {"compiler", "cpu_compiled", "cpu_detected", "cpu_selected"}
    assert info["cpu_compiled"][-1] == info["cpu_detected"][-1] == "portable"
    assert set(info["cpu_detected"]) <= set(info["cpu_compiled"]) <= set(INSTRUCTION_SETS)
    assert info["cpu_selected"] in info["cpu_detected"]
