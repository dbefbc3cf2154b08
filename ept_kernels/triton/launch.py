"""The one place that starts a kernel, so that tests can count launches and a static check can compile them instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Arguments that change with the batch. Triton would compile a kernel anew where such a number becomes 1 or a multiple
#: of 16, and gain nothing: rows lie ``stride_row`` apart, and what is contiguous are their features, whose number,
#: strides and addresses it does specialise on. (Only where x is a transposed view would its loads become wider.)
FROM_BATCH = ("rows", "segment", "spans", "num_groups", "first_task")


@dataclass(frozen=True)
class Config:
    """A kernel's tile sizes (compile-time arguments by name) and how it is compiled."""

    tiles: tuple[tuple[str, Any], ...]
    num_warps: int = 4
    num_stages: int = 2

    @staticmethod
    def of(num_warps: int = 4, num_stages: int = 2, **tiles: int | tuple[int, ...]) -> Config:
        return Config(tuple(tiles.items()), num_warps, num_stages)

    def __getitem__(self, tile: str) -> Any:
        return dict(self.tiles)[tile]


def run(kernel: Any, grid: tuple[int, ...], arguments: tuple, constants: dict[str, Any], config: Config) -> None:
    """Start ``kernel`` on the current device and its stream."""
    kernel[grid](
        *arguments, **constants, **dict(config.tiles), num_warps=config.num_warps, num_stages=config.num_stages
    )


#: What ``launch`` calls; a test or a static check may replace it.
runner: Callable[[Any, tuple[int, ...], tuple, dict[str, Any], Config], None] = run


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, config: Config, **constants: Any) -> None:
    """Start ``kernel`` with run-time arguments, compile-time ones and a config's tiles; nothing for an empty grid.

    Triton starts kernels on the current device, and a layer need not be on it: that of the first tensor is made so.
    """
    if 0 in grid:
        return
    device = next(argument.get_device() for argument in arguments if isinstance(argument, Tensor))
    if device < 0 or device == torch.cuda.current_device():
        runner(kernel, grid, arguments, constants, config)
        return
    with torch.cuda.device(device):
        runner(kernel, grid, arguments, constants, config)
