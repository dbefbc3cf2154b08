"""Bytes, FLOPs and time floor of one adapted linear layer, launch by launch.

Notation: T tokens, ``in`` and ``out`` features, rank r, s bytes in a number of the rows' dtype. ``K`` is the set of
*active* scales (those that the top-k experts of a row use), w_k = ceil(in / k), h_k = ceil(out / k),
S all scales of the pyramid, R = r * sum_{k in K} k the numbers that shrinking leaves of a row (R' = r * sum_{k in S} k
those that there is room for), and C >= R the columns that the kernel really issues:
``sum_k pow2(r) * pow2(k)`` where a generated matrix is padded to powers of two, R where it is not.
A, B and the folded kernels are fp32 (4 bytes) beside rows of any dtype; U, V, dU are stored in the rows' dtype.

**A launch** cannot take less than ``max(bytes / bandwidth, FLOPs / rate)``, a sequence not less than the sum. Bytes
are, by default, those that must cross the memory bus: every tensor once, re-reads by other tiles served from the
cache. With ``tiles`` they are what the launch grid asks for: a product with a grid of ``ceil(T / rows) x
ceil(columns / cols)`` programs loads its left operand once for every column of the grid and its right operand once for
every row. Launch latency, caches too small for that reuse and rates below the peak come on top.

**FLOPs.** Base: ``2 T in out``. Shrink on matrix units is a dense product with the matrix generated in registers,
``Ahat[(p, q), c] = A[p, c // k] (c % k == q)``, so ``2 T in C``: k times the ``2 T in r`` per scale that the algebra
needs, because k - 1 of k entries of Ahat are zero. Expand, the same the other way: ``2 T C out``. dA and dB are dense
products of which the diagonal is kept, for every scale of the pyramid (C' columns), active or not: ``2 T in C'``,
``2 T out C'``. Core ``V = U Kbar^T``: ``2 T pow2(r) pow2(k)^2`` a scale; shrinking dy has two of that size,
``dU = dV Kbar`` and ``dKbar = dV^T U``.

**Forward**

=============  ============================================================  ==========================
launch         reads                                                         writes
=============  ============================================================  ==========================
shrink         x ``T in s``, A ``4 r w`` (w of the smallest active scale),   V ``T R' s``
               folded ``4 sum k^2`` a task, groups 4 bytes a row block
gemm           x, W ``in out s``                                             y ``T out s``
gemm + expand  x, W, V, B ``4 r h`` (h of the smallest active scale)         y
expand         y, V, B                                                       y
all in one     x, W, A, B, folded, groups, V                                 V, y
=============  ============================================================  ==========================

- frozen linear: gemm.
- EPT unfused: shrink, gemm, expand. The last reads and writes y again: ``2 T out s`` more.
- EPT, two launches: shrink, gemm + expand. x is read twice.
- EPT, one launch: shrinking rides in the product as extra column tiles that share x through the cache; x is read once,
  V is written by those tiles and read by the others.
- LoRA (r columns, nothing padded, no core, A and B in the rows' dtype): the unfused sequence. "PEFT" is what PEFT's
  eager code launches instead of the last step: the product with B into a tensor of its own, that times alpha / r into
  another, the sum into a third.

**Backward** (dy given; x, W and the adapter saved; U and V recomputed). The layer says which scales a group's experts
use (``active``), so that the others are not shrunk, have no core and no dKbar; the kernels decide it on the device.
Without that table the gradient of every kernel must be computed.

1. shrink x again: as above, writes U ``T R s`` and V (zeros where a scale is inactive: what follows reads whole tiles).
2. shrink dy: reads dy ``T out s``, B, folded, groups, U; writes dU ``T R' s`` and the active kernels' gradient of every
   row block, ``4 sum k^2`` each. dV stays in registers.
3. dx: ``dy W`` with dU expanded through A in the epilogue (unfused: its own launch, which reads and writes dx again).
4. seed gradients: reads x, dy (in fp32 once more for every further eight scales: not counted), and of dU and V what is
   active; writes ``splits`` partial sums of dA and dB for every scale, ``4 r |S| (in + out)`` each. The products are
   those of all scales: the inactive ones multiply zeros.
5. reduce: reads the partial sums, writes dA, dB, dKbar.

A frozen linear needs ``dx = dy W`` alone, and not x. LoRA keeps u, so its backward has no step 1.

**Overlapped.** The launches of "two launches", and its backward's, run beside each other: the whole pass takes
``max(all bytes / bandwidth, all FLOPs / rate)``. What remains over the frozen linear is arithmetic.

**Lower bound.** One launch for each pass that touches every tensor once and does no redundant arithmetic: what no
design can beat. Comparing it with "one launch" shows what the generated matrices' zeros cost.

Which launches make which design is in ``roofline_designs``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from roofline_devices import Accelerator

from ept_kernels import PyramidGeometry

ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "tf32": 4, "fp32": 4}
PARAMETER_BYTES = 4
GROUP_BYTES = 4
PADDINGS = ("pow2", "none")


def pow2(value: int) -> int:
    """The smallest power of two that is not below ``value``."""
    return 1 << (value - 1).bit_length()


def blocks(size: int, block: int) -> int:
    return -(-size // block)


@dataclass(frozen=True)
class Tiles:
    """Programs of a product's grid: rows of the left operand and columns of the result that one program computes."""

    rows: int
    cols: int


@dataclass(frozen=True)
class Work:
    """One call of one layer.

    Args:
        tokens: rows of x.
        geometry: the layer's sizes.
        active: the distinct scales in use.
        dtype: of x, W, y: "bf16", "fp16", "tf32" or "fp32".
        tasks: folded kernels in use.
        padding: "pow2" or "none": columns that the generated matrices are padded to.
        row_block: rows of a program of the shrink kernel.
        splits: parts into which the rows are cut for the gradients of A and B.

    Raises:
        ValueError: a value out of its range.
    """

    tokens: int
    geometry: PyramidGeometry
    active: tuple[int, ...]
    dtype: str = "bf16"
    tasks: int = 1
    padding: str = "pow2"
    row_block: int = 64
    splits: int = 16

    def __post_init__(self) -> None:
        for name in ("tokens", "tasks", "row_block", "splits"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        if not self.active or len(set(self.active)) != len(self.active) or set(self.active) - set(self.geometry.scales):
            raise ValueError(f"active must be distinct scales out of {self.geometry.scales}, got {self.active}")
        if self.dtype not in ELEMENT_BYTES:
            raise ValueError(f"dtype must be one of {', '.join(ELEMENT_BYTES)}, got {self.dtype!r}")
        if self.padding not in PADDINGS:
            raise ValueError(f"padding must be one of {', '.join(PADDINGS)}, got {self.padding!r}")

    @property
    def size(self) -> int:
        """Bytes of a number of the rows' dtype."""
        return ELEMENT_BYTES[self.dtype]

    @property
    def row_blocks(self) -> int:
        return blocks(self.tokens, self.row_block)

    @property
    def widths(self) -> list[int]:
        return [self.geometry.widths[self.geometry.scales.index(k)] for k in self.active]

    @property
    def heights(self) -> list[int]:
        return [self.geometry.heights[self.geometry.scales.index(k)] for k in self.active]

    @property
    def folded(self) -> int:
        """Numbers in one task's active folded kernels."""
        return sum(k * k for k in self.active)

    @property
    def shrunk(self) -> int:
        """R: numbers that shrinking leaves of a row."""
        return self.geometry.rank * sum(self.active)

    def _padded(self, value: int) -> int:
        return pow2(value) if self.padding == "pow2" else value

    @property
    def columns(self) -> int:
        """C: columns that the matrix units compute for a row."""
        return self._padded(self.geometry.rank) * sum(self._padded(k) for k in self.active)

    @property
    def room(self) -> int:
        """R': numbers of a row of intermediates, with those of inactive scales."""
        return self.geometry.rank * sum(self.geometry.scales)

    @property
    def all_columns(self) -> int:
        """C': columns of all scales."""
        return self._padded(self.geometry.rank) * sum(self._padded(k) for k in self.geometry.scales)

    @property
    def core_flops(self) -> int:
        """Of ``V = U Kbar^T`` for all rows."""
        return 2 * self.tokens * self._padded(self.geometry.rank) * sum(self._padded(k) ** 2 for k in self.active)


@dataclass(frozen=True)
class Launch:
    """One kernel: bytes read and written by tensor name, FLOPs of its matrix products."""

    name: str
    reads: Mapping[str, int]
    writes: Mapping[str, int]
    flops: int = 0

    @property
    def bytes(self) -> int:
        return sum(self.reads.values()) + sum(self.writes.values())

    def floor(self, device: Accelerator, dtype: str) -> float:
        """Seconds that ``device`` needs at least."""
        return max(self.bytes / device.bandwidth, self.flops / device.rates[dtype])


Launches = tuple[Launch, ...]


# --- launches ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Side:
    """One of the two directions through a layer: names and sizes of what enters, what leaves, and their factors."""

    rows: str
    result: str
    features: int
    results: int
    shrink_factor: str
    shrink_slices: list[int] = field(repr=False)
    expand_factor: str = ""
    expand_slices: list[int] = field(default_factory=list, repr=False)


def _forward(work: Work) -> _Side:
    g = work.geometry
    return _Side("x", "y", g.in_features, g.out_features, "A", work.widths, "B", work.heights)


def _backward(work: Work) -> _Side:
    g = work.geometry
    return _Side("dy", "dx", g.out_features, g.in_features, "B", work.heights, "A", work.widths)


def _factor(work: Work, slices: list[int], row_blocks: int | None) -> int:
    """Bytes of A or B: the longest slice once, or every scale's slice for every row block of the grid."""
    numbers = max(slices) if row_blocks is None else row_blocks * sum(slices)
    return PARAMETER_BYTES * work.geometry.rank * numbers


def _gemm_reads(work: Work, side: _Side, tiles: Tiles | None) -> dict[str, int]:
    across = blocks(side.results, tiles.cols) if tiles else 1
    down = blocks(work.tokens, tiles.rows) if tiles else 1
    return {
        side.rows: work.tokens * side.features * work.size * across,
        "W": work.geometry.in_features * work.geometry.out_features * work.size * down,
    }


def _gemm_flops(work: Work) -> int:
    return 2 * work.tokens * work.geometry.in_features * work.geometry.out_features


def _result(work: Work, side: _Side) -> dict[str, int]:
    return {side.result: work.tokens * side.results * work.size}


def _shrink_parameters(work: Work, side: _Side, tiles: Tiles | None) -> dict[str, int]:
    row_blocks = blocks(work.tokens, tiles.rows) if tiles else None
    groups = row_blocks or work.row_blocks
    return {
        side.shrink_factor: _factor(work, side.shrink_slices, row_blocks),
        "folded": PARAMETER_BYTES * work.folded * (row_blocks or work.tasks),
        "groups": GROUP_BYTES * groups,
    }


def _intermediate(work: Work) -> int:
    return work.tokens * work.shrunk * work.size


def _room(work: Work) -> int:
    return work.tokens * work.room * work.size


def gemm(work: Work, tiles: Tiles | None = None, backward: bool = False) -> Launch:
    """The frozen linear: ``y = x W^T``, or backward ``dx = dy W``."""
    side = _backward(work) if backward else _forward(work)
    return Launch("gemm", _gemm_reads(work, side, tiles), _result(work, side), _gemm_flops(work))


def shrink(work: Work, tiles: Tiles | None = None, keep_u: bool = False) -> Launch:
    """All active scales of all rows of x. ``tiles.rows`` is the row block; a program holds all columns."""
    side = _forward(work)
    reads = {"x": work.tokens * side.features * work.size, **_shrink_parameters(work, side, tiles)}
    writes = {"U": _intermediate(work)} if keep_u else {}
    flops = 2 * work.tokens * side.features * work.columns + work.core_flops
    return Launch("shrink x", reads, {**writes, "V": _room(work)}, flops)


def shrink_gradient(work: Work, tiles: Tiles | None = None) -> Launch:
    """dV from dy, kept in registers; dU, and the kernels' gradient of every row block."""
    side = _backward(work)
    row_blocks = blocks(work.tokens, tiles.rows) if tiles else work.row_blocks
    reads = {
        "dy": work.tokens * side.features * work.size,
        **_shrink_parameters(work, side, tiles),
        "U": _intermediate(work),
    }
    writes = {"dU": _room(work), "dfolded partials": PARAMETER_BYTES * work.folded * row_blocks}
    flops = 2 * work.tokens * side.features * work.columns + 2 * work.core_flops  # dV^T U and dV Kbar
    return Launch("shrink dy", reads, writes, flops)


def _expand_reads(work: Work, side: _Side, tiles: Tiles | None, rows: str) -> dict[str, int]:
    across = blocks(side.results, tiles.cols) if tiles else 1
    row_blocks = blocks(work.tokens, tiles.rows) if tiles else None
    return {
        rows: _intermediate(work) * across,
        side.expand_factor: _factor(work, side.expand_slices, row_blocks),
    }


def gemm_expand(work: Work, tiles: Tiles | None = None, backward: bool = False) -> Launch:
    """The base product with the expansion of V (backward: of dU) as its epilogue."""
    side = _backward(work) if backward else _forward(work)
    reads = {**_gemm_reads(work, side, tiles), **_expand_reads(work, side, tiles, "dU" if backward else "V")}
    flops = _gemm_flops(work) + 2 * work.tokens * work.columns * side.results
    return Launch("gemm + expand", reads, _result(work, side), flops)


def expand(work: Work, tiles: Tiles | None = None, backward: bool = False) -> Launch:
    """The expansion alone, added to a result that is there already."""
    side = _backward(work) if backward else _forward(work)
    reads = {**_result(work, side), **_expand_reads(work, side, tiles, "dU" if backward else "V")}
    return Launch("expand", reads, _result(work, side), 2 * work.tokens * work.columns * side.results)


def gemm_shrink_expand(work: Work, tiles: Tiles | None = None) -> Launch:
    """Forward in one launch: the shrink's columns are extra column tiles of the base product's grid."""
    side = _forward(work)
    reads = {
        **_gemm_reads(work, side, tiles),
        **_shrink_parameters(work, side, tiles),
        **_expand_reads(work, side, tiles, "V"),
    }
    if tiles:
        extra = blocks(work.columns, tiles.cols)
        reads["x"] += work.tokens * side.features * work.size * extra
    flops = _gemm_flops(work) + 2 * work.tokens * work.columns * (side.features + side.results) + work.core_flops
    return Launch("gemm + shrink + expand", reads, {"V": _room(work), **_result(work, side)}, flops)


def _seed_partials(work: Work) -> dict[str, int]:
    g = work.geometry
    each = PARAMETER_BYTES * g.rank * len(g.scales) * work.splits
    return {"dA partials": each * g.in_features, "dB partials": each * g.out_features}


def seed_gradients(work: Work, tiles: Tiles | None = None) -> Launch:
    """Partial sums of dA and dB. A program takes ``tiles.cols`` columns of x (or of dy) of one split of the rows."""
    g = work.geometry
    across_in, across_out = (blocks(n, tiles.cols) if tiles else 1 for n in (g.in_features, g.out_features))
    reads = {
        "x": work.tokens * g.in_features * work.size,
        "dU": _intermediate(work) * across_in,
        "dy": work.tokens * g.out_features * work.size,
        "V": _intermediate(work) * across_out,
    }
    flops = 2 * work.tokens * work.all_columns * (g.in_features + g.out_features)
    return Launch("seed gradients", reads, _seed_partials(work), flops)


def reduce_gradients(work: Work) -> Launch:
    """The partial sums of dA, dB and the folded kernels, added in a fixed order."""
    g = work.geometry
    partials = {**_seed_partials(work), "dfolded partials": PARAMETER_BYTES * work.folded * work.row_blocks}
    writes = {
        "dA": PARAMETER_BYTES * g.rank * g.seed_width,
        "dB": PARAMETER_BYTES * g.rank * g.seed_height,
        "dfolded": PARAMETER_BYTES * g.folded_size * work.tasks,
    }
    return Launch("reduce", partials, writes)


# --- what no design can beat ------------------------------------------------------------------------------------------


def _algebra(work: Work, in_products: int, out_products: int, cores: int) -> int:
    """FLOPs beside the base: products of ``T r in`` and of ``T r out`` a scale, and of ``T r k^2``."""
    g = work.geometry
    wide = len(work.active) * (in_products * g.in_features + out_products * g.out_features)
    return 2 * work.tokens * g.rank * (wide + cores * work.folded)


def bound_forward(work: Work) -> Launch:
    """Shrink, core and expand: every tensor once, no redundant arithmetic."""
    side = _forward(work)
    reads = {**_gemm_reads(work, side, None), **_shrink_parameters(work, side, None)}
    reads["B"] = _factor(work, side.expand_slices, None)
    return Launch("bound", reads, _result(work, side), _gemm_flops(work) + _algebra(work, 1, 1, 1))


def bound_backward(work: Work) -> Launch:
    """Shrink x and dy, expand dU, dA and dB, three products of cores: every tensor once, no redundant arithmetic."""
    side = _backward(work)
    reads = {**_gemm_reads(work, side, None), **_shrink_parameters(work, side, None)}
    reads["A"] = _factor(work, side.expand_slices, None)
    reads["x"] = work.tokens * work.geometry.in_features * work.size
    writes = {**_result(work, side), **reduce_gradients(work).writes}
    return Launch("bound", reads, writes, _gemm_flops(work) + _algebra(work, 3, 2, 3))
