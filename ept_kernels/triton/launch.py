"""The one place that starts a kernel, so that tests can count launches and a static check can compile them instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: Arguments that change with the batch. Triton would compile a kernel anew where such a number becomes 1 or a multiple
#: of 16, and gain nothing: rows lie ``stride_row`` apart, and what is contiguous are their features, whose number,
#: strides and addresses it does specialise on. (Only where x is a transposed view would its loads become wider.)
FROM_BATCH = (
    "rows_total",
    "segment",
    "blocks_per_segment",
    "shrink_blocks",
    "units",
    "units_per_segment",
    "span",
    "spans",
    "a_spans",
    "b_spans",
    "num_groups",
    "first_task",
    "num_tasks",
    "rank_blocks",  # of partial sums that may be spans of rows
    "every_scale",  # not of the batch: its value is to stay unknown
)


@dataclass(frozen=True)
class Config:
    """A kernel's tile sizes (compile-time arguments by name) and how it is compiled."""

    tiles: tuple[tuple[str, int], ...]
    num_warps: int = 4
    num_stages: int = 2

    @staticmethod
    def of(num_warps: int = 4, num_stages: int = 2, **tiles: int) -> Config:
        return Config(tuple(tiles.items()), num_warps, num_stages)

    def __getitem__(self, tile: str) -> int:
        return dict(self.tiles)[tile]


def run(kernel: Any, grid: tuple[int, ...], arguments: tuple, constants: dict[str, Any], config: Config) -> None:
    """Start ``kernel`` on the current device and its stream; ``target.on_its_device`` has made it the tensors' own."""
    kernel[grid](
        *arguments, **constants, **dict(config.tiles), num_warps=config.num_warps, num_stages=config.num_stages
    )


#: What ``launch`` calls; a test or a static check may replace it.
runner: Callable[[Any, tuple[int, ...], tuple, dict[str, Any], Config], None] = run


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, config: Config, **constants: Any) -> None:
    """Start ``kernel`` with run-time arguments, compile-time ones and a config's tiles; nothing for an empty grid."""
    if 0 not in grid:
        runner(kernel, grid, arguments, constants, config)
