"""What the kernels of one pyramid are specialised on: block shapes of every scale, computed once.

A row of intermediates ``[T, r * sum(k)]`` holds the scales one after the other, rank-major: column ``r * (k_1 + ...) +
p * k + q``. Triton's blocks have power-of-two sides, so a scale's block is ``[rank block, slot block]`` with its slots
``q`` padded to a power of two, and matrix instructions want at least 16 columns of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import triton

#: Columns of all scales together that one program accumulates; more ranks go to further programs.
COLUMN_BUDGET = 192

#: Bits of the int32 that says in which scales a row of V is not zero.
MOST_SCALES = 32


@dataclass(frozen=True)
class Plan:
    """Compile-time shape of a pyramid's kernels.

    Attributes:
        scales: distinct k, ascending. slots: each k padded to a power of two.
        ranks: rank block of each scale: ``rank_block``, or as many as fill 16 columns (the surplus is masked).
        columns: where each scale starts in a row of intermediates. offsets: where it starts in a folded kernel.
        width: numbers in a row of intermediates, ``r * sum(k)``. folded_size: ``sum(k * k)``.
        rank_block: ranks that one program serves. rank_blocks: programs that serve all ranks.
        block_columns: columns that one program accumulates.
    """

    scales: tuple[int, ...]
    slots: tuple[int, ...]
    ranks: tuple[int, ...]
    columns: tuple[int, ...]
    offsets: tuple[int, ...]
    rank: int
    width: int
    folded_size: int
    rank_block: int
    rank_blocks: int
    block_columns: int

    @property
    def every_scale(self) -> int:
        """A bit for each scale. The kernels take it at run time, so that no compiler can tell what it says."""
        return (1 << len(self.scales)) - 1

    def constants(self) -> dict[str, object]:
        """The kernels' common compile-time arguments."""
        return {
            "SCALES": self.scales,
            "SLOTS": self.slots,
            "RANKS": self.ranks,
            "COLUMNS": self.columns,
            "OFFSETS": self.offsets,
            "WIDTH": self.width,
            "FOLDED": self.folded_size,
            "RANK_BLOCK": self.rank_block,
        }


@lru_cache(maxsize=256)
def plan_for(rank: int, scales: Sequence[int]) -> Plan:
    """The plan of a pyramid of ``scales`` (a tuple, ascending) over a seed of rank ``rank``.

    Raises:
        ValueError: more scales than a row's word of activity has bits.
    """
    if len(scales) > MOST_SCALES:
        raise ValueError(
            f"kernel_sizes holds {len(scales)} distinct scales; the triton backend takes at most {MOST_SCALES} "
            "(EPT_BACKEND=torch takes any number)"
        )
    slots = tuple(triton.next_power_of_2(k) for k in scales)

    def ranks(block: int) -> tuple[int, ...]:
        return tuple(max(block, 16 // slot) for slot in slots)

    def columns(block: int) -> int:
        return sum(count * slot for count, slot in zip(ranks(block), slots, strict=True))

    block = triton.next_power_of_2(rank)
    while block > 1 and columns(block) > COLUMN_BUDGET:
        block //= 2
    return Plan(
        scales=tuple(scales),
        slots=slots,
        ranks=ranks(block),
        columns=tuple(rank * sum(scales[:s]) for s in range(len(scales))),
        offsets=tuple(sum(k * k for k in scales[:s]) for s in range(len(scales))),
        rank=rank,
        width=rank * sum(scales),
        folded_size=sum(k * k for k in scales),
        rank_block=block,
        rank_blocks=triton.cdiv(rank, block),
        block_columns=columns(block),
    )


@dataclass(frozen=True)
class Rows:
    """How T rows fall into groups and row blocks.

    Attributes:
        rows: T. segment: consecutive rows that share an entry of ``groups``.
        aligned: blocks start anew with every segment, so that a block has one group; else a block may mix groups and
            every row looks its own up.
        blocks_per_segment, blocks: row blocks of a segment (of all rows, unless aligned), and in all.
    """

    rows: int
    segment: int
    aligned: bool
    blocks_per_segment: int
    blocks: int

    @property
    def units(self) -> int:
        """Partial gradients of the folded kernels: one a block, or one a row where blocks mix groups."""
        return self.blocks if self.aligned else self.rows

    @property
    def units_per_segment(self) -> int:
        return self.blocks_per_segment if self.aligned else self.segment


def rows_for(rows: int, segments: int, block_rows: int, *, regular: bool = False) -> Rows:
    """Tile ``rows`` rows in ``segments`` equal runs by blocks of ``block_rows``.

    Segments at least half as long as a block are tiled one by one, at most half of the lanes idle; the blocks of
    shorter ones mix groups. With ``regular``, block i must hold rows ``i * block_rows`` and on, so that only segments
    of whole blocks are tiled one by one.
    """
    segment = rows // segments if segments else 0
    aligned = segments <= 1 or (segment % block_rows == 0 if regular else 2 * segment >= block_rows)
    if aligned:
        per_segment = triton.cdiv(segment, block_rows)
        return Rows(rows, max(segment, 1), True, max(per_segment, 1), per_segment * max(segments, 1))
    blocks = triton.cdiv(rows, block_rows)
    return Rows(rows, max(segment, 1), False, max(blocks, 1), blocks)
