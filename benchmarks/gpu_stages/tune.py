"""Configurations of plan ``fused``'s kernel beside the two products of plan ``library``, at a few sizes.

``OUT/fused_configs.json`` gets the fastest of each size. A grid wider than the shipped candidates is compiled by many
processes at once into Triton's cache, the shipped ones first; what is not compiled in time is not timed.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import contextmanager

import torch
from harness import Timed
from torch import Tensor

from ept_kernels.library import two_products

from .bench import Bench
from .tensors import RANK, _served

#: (in, out, tokens)
POINTS = (
    (4096, 4096, 8192),
    (4096, 11008, 8192),
    (4096, 4096, 2048),
    (4096, 4096, 512),
    (768, 768, 8192),
    (4096, 4096, 16),
)
WIDTH = RANK * (2 + 4 + 6 + 8)
FILE = "fused_configs.json"
#: Bytes of shared memory of a program on a data-centre GPU.
SHARED_MEMORY = 227 * 1024
#: A part of the stage's time is for compiling, seconds of it are for the first size.
COMPILING = 0.5

Configuration = dict[str, int]


def grid(tokens: int) -> list[Configuration]:
    """Tiles beyond those that are shipped, for many rows or few."""
    if tokens > 64:
        sides = [(128, 256), (256, 128), (128, 128), (64, 256)]
        axes = itertools.product(sides, (64, 128), (4, 8), (3, 4))
    else:
        axes = itertools.product([(16, 32), (16, 64), (16, 128)], (64, 128, 256), (4, 8), (3, 5))
    found = []
    for (block_t, block_o), block_i, warps, stages in axes:
        bytes_of_stages = 2 * (block_t + block_o) * block_i * stages
        accumulators = block_t * block_o // (32 * warps)
        if bytes_of_stages <= SHARED_MEMORY and accumulators <= 128:
            tiles = {"BLOCK_T": block_t, "BLOCK_O": block_o, "BLOCK_I": block_i}
            found.append({**tiles, "num_warps": warps, "num_stages": stages})
    return found


def shipped(tokens: int) -> list[Configuration]:
    """The kernel's own candidates on the current device, its default first."""
    from ept_kernels.triton.fused import candidates

    return [
        {**dict(config.tiles), "num_warps": config.num_warps, "num_stages": config.num_stages}
        for config in candidates(tokens)
    ]


@contextmanager
def configured(configuration: Configuration) -> Iterator[None]:
    """Inside, the kernel has one candidate."""
    from ept_kernels.triton import fused as module
    from ept_kernels.triton.launch import Config

    before = module.candidates
    module.candidates = lambda rows: [Config.of(**configuration)]
    try:
        yield
    finally:
        module.candidates = before


def _operands(device: torch.device, dtype: torch.dtype, inner: int, features: int, rows: int) -> tuple[Tensor, ...]:
    """x, weight, V and Bhat."""

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (std * torch.randn(shape, device=device)).to(dtype)

    return normal(rows, inner), normal(features, inner, std=inner**-0.5), normal(rows, WIDTH), normal(WIDTH, features)


def _call(configuration: Configuration, operands: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    from ept_kernels.triton.fused import fused

    x, weight, V, hat = operands

    def call() -> Tensor:
        with configured(configuration):
            return fused(x, weight, None, V, hat)

    return call


def _compile(
    configuration: Configuration, inner: int, features: int, rows: int, device: str, dtype: torch.dtype
) -> None:
    """In a process of its own: run once, so that Triton's cache on disk has the kernel."""
    _call(configuration, _operands(torch.device(device), dtype, inner, features, rows))()
    if device != "cpu":
        torch.cuda.synchronize()


def run(bench: Bench) -> None:
    if "triton" not in _served(bench.device, bench.half):
        bench.emit(what="tune", error=f"backend triton does not serve {bench.half} on {bench.device}")
        return
    points = POINTS[:1] if bench.dry else POINTS
    best: list[dict[str, object]] = []
    for place, (inner, features, rows) in enumerate(points):
        if bench.left < 6:
            bench.emit(what="tune", **{"in": inner, "out": features, "tokens": rows}, skipped="no time left")
            continue
        share = bench.left / (len(points) - place)
        inner, features = bench.size(inner, features)
        rows = 32 if bench.dry else rows
        labels = {"in": inner, "out": features, "tokens": rows}
        with bench.attempt(what="tune", **labels):
            entry = _point(bench, inner, features, rows, share, labels)
            best.append(entry)
            (bench.out / FILE).write_text(json.dumps(best, indent=1) + "\n")


def _point(
    bench: Bench, inner: int, features: int, rows: int, share: float, labels: dict[str, int]
) -> dict[str, object]:
    operands = _operands(bench.device, bench.half, inner, features, rows)
    x, weight, V, hat = operands
    exact = two_products(*(tensor.double() for tensor in (x, weight)), None, *(tensor.double() for tensor in (V, hat)))
    own = shipped(rows)
    wider = [] if bench.dry else [each for each in grid(rows) if each not in own]
    ready = _compiled(bench, [*own, *wider], (inner, features, rows), share * COMPILING)
    calls = {"library": Timed(bench.graphed(lambda: two_products(x, weight, None, V, hat)))}
    calls["base product"] = Timed(bench.graphed(lambda: x @ weight.T))
    by_name = {}
    for configuration in ready:
        name = " ".join(
            f"{key.removeprefix('BLOCK_').removeprefix('num_')}{value}" for key, value in configuration.items()
        )
        with bench.attempt(what="tune", config=configuration, **labels):
            call = _call(configuration, operands)
            error = ((call().double() - exact).norm() / exact.norm()).item()
            if not error < 1e-2:
                bench.emit(what="tune", config=configuration, **labels, right=False, error=f"{error:.1e} off")
                continue
            calls[name], by_name[name] = Timed(bench.graphed(call)), configuration
    medians = bench.compare(
        calls,
        key="config",
        baseline="base product",
        rounds=15,
        seconds=share * (1 - COMPILING) / 2,
        what="tune",
        **labels,
    )
    if not by_name:
        raise RuntimeError("no configuration could be run")
    name = min(by_name, key=lambda each: medians[each])
    default = next(each for each, configuration in by_name.items() if configuration == own[0])
    bench.emit(
        what="best",
        **labels,
        best=name,
        default=default,
        best_us=medians[name],
        over_default=medians[name] / medians[default],
        over_library=medians[name] / medians["library"],
        over_cublas=medians[name] / medians["base product"],
    )
    return {
        "kernel": "fused",
        "device": str(bench.shared["device"]),
        "dtype": str(bench.half).removeprefix("torch."),
        "inner": inner,
        "features": features,
        "rows": rows,
        "width": WIDTH,
        "config": by_name[name],
        "over_library": medians[name] / medians["library"],
    }


def _compiled(
    bench: Bench, configurations: list[Configuration], sizes: tuple[int, int, int], seconds: float
) -> list[Configuration]:
    """Those that compiled in time, in their order; a dry run has nothing to compile."""
    if bench.dry:
        return configurations
    workers = max(1, min(12, (os.cpu_count() or 2) - 2))
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    waiting: dict[Future[None], Configuration] = {}
    for configuration in configurations:
        waiting[pool.submit(_compile, configuration, *sizes, str(bench.device), bench.half)] = configuration
    done, _ = wait(waiting, timeout=seconds)
    processes = list(pool._processes.values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:  # a compilation cannot be cancelled
        process.kill()
    found = []
    for future, configuration in waiting.items():
        if future in done and not future.cancelled():
            if future.exception() is None:
                found.append(configuration)
            else:
                bench.emit(what="tune", config=configuration, refused=str(future.exception())[:200])
    return found
