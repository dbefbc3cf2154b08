"""Configurations of plan ``fused``'s kernel beside the two products of plan ``library``, at a few sizes.

``OUT/fused_configs.json`` gets the fastest of each size. A grid wider than the shipped candidates is compiled by many
processes at once into Triton's cache, the shipped ones first; what is not compiled in time is not timed.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from harness import Timed
from torch import Tensor

from ept_kernels.backends.gpu import two_products
from ept_kernels.doctor import relative_errors

from .bench import Bench
from .tensors import RANK, providers

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
#: The part of the stage's time that is for compiling.
COMPILING = 0.5
#: Rows up to which the kernel takes tiles of their own.
FEW = 64
MOST_ERROR = 1e-2

Configuration = dict[str, int]


def grid(tokens: int) -> list[Configuration]:
    """Tiles beyond those that are shipped, for many rows or few."""
    if tokens > FEW:
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


def _compile(configuration: Configuration, rows: int, device: str, dtype: torch.dtype) -> None:
    """In a process of its own: run once, so that Triton's cache on disk has the kernel of any size."""
    _call(configuration, _operands(torch.device(device), dtype, 512, 512, rows))()
    torch.cuda.synchronize()


def run(bench: Bench) -> None:
    if "triton" not in providers(bench.device, bench.half):
        bench.emit(what="tune", error=f"backend triton does not serve {bench.half} on {bench.device}")
        return
    points = POINTS[:1] if bench.dry else POINTS
    ready = {many: shipped(8192 if many else 16) for many in (True, False)} if bench.dry else _compiled(bench)
    best: list[dict[str, object]] = []
    for place, (inner, features, rows) in enumerate(points):
        if bench.left < 4:
            bench.emit(what="tune", **{"in": inner, "out": features, "tokens": rows}, skipped="no time left")
            continue
        inner, features = bench.size(inner, features)
        rows = 32 if bench.dry else rows
        labels = {"in": inner, "out": features, "tokens": rows}
        with bench.attempt(what="tune", **labels):
            best.append(
                _point(bench, inner, features, rows, ready[rows > FEW], bench.left / (len(points) - place), labels)
            )
            (bench.out / FILE).write_text(json.dumps(best, indent=1) + "\n")


def _compiled(bench: Bench) -> dict[bool, list[Configuration]]:
    """Configurations for many rows and for few that compiled in time, the shipped ones first.

    One kernel serves all sizes here: Triton tells apart what is a multiple of 16, and all are.
    """
    end = time.monotonic() + COMPILING * bench.left
    workers = max(1, min(12, (os.cpu_count() or 2) - 2))
    found: dict[bool, list[Configuration]] = {True: [], False: []}
    with multiprocessing.get_context("spawn").Pool(workers) as pool:  # ended with whatever it still compiles
        waiting = []
        for wanted in (shipped, grid):
            for rows in (8192, 16):
                for configuration in wanted(rows):
                    if all(configuration != other for _, other, _ in waiting):
                        arguments = (configuration, min(rows, 512), str(bench.device), bench.half)
                        waiting.append((rows > FEW, configuration, pool.apply_async(_compile, arguments)))
        for many, configuration, result in waiting:
            result.wait(max(0.0, end - time.monotonic()))
            if not result.ready():
                bench.emit(what="tune", config=configuration, skipped="not compiled in time")
            elif result.successful():
                found[many].append(configuration)
            else:
                with bench.attempt(what="tune", config=configuration):
                    result.get()
    return found


def _point(
    bench: Bench,
    inner: int,
    features: int,
    rows: int,
    configurations: list[Configuration],
    seconds: float,
    labels: dict[str, int],
) -> dict[str, object]:
    """Time them beside the products of plan ``library``; the entry of the fastest."""
    operands = _operands(bench.device, bench.half, inner, features, rows)
    x, weight, V, hat = operands
    exact = two_products(x.double(), weight.double(), None, V.double(), hat.double())
    calls = {"base product": Timed(bench.graphed(lambda: x @ weight.T))}
    calls["library"] = Timed(bench.graphed(lambda: two_products(x, weight, None, V, hat)))
    by_name: dict[str, Configuration] = {}
    for configuration in configurations:
        name = " ".join(f"{key.split('_')[1]}{value}" for key, value in configuration.items())
        with bench.attempt(what="tune", config=configuration, **labels):
            call = _call(configuration, operands)
            error = relative_errors([call()], [exact])[0]
            if not error < MOST_ERROR:
                bench.emit(what="tune", config=configuration, **labels, right=False, error=f"{error:.1e} off")
                continue
            calls[name], by_name[name] = Timed(bench.graphed(call)), configuration
    if not by_name:
        raise RuntimeError("no configuration could be run")
    medians = bench.compare(
        calls, key="config", baseline="base product", rounds=15, seconds=seconds / 2, what="tune", **labels
    )
    best, default = min(by_name, key=lambda name: medians[name]), next(iter(by_name))
    over = {
        "over_default": medians[best] / medians[default],
        "over_library": medians[best] / medians["library"],
        "over_cublas": medians[best] / medians["base product"],
    }
    bench.emit(what="best", **labels, best=best, default=default, best_us=medians[best], **over)
    return {
        "kernel": "fused",
        "device": str(bench.shared["device"]),
        "dtype": str(bench.half).removeprefix("torch."),
        "inner": inner,
        "features": features,
        "rows": rows,
        "width": WIDTH,
        "config": by_name[best],
        **over,
    }
