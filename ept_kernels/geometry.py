"""The static shape of one pyramid layer: every size that kernels, layers and docs need, computed and validated once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

#: Experts of a layer at most: every one has parameters of its own.
MOST_EXPERTS = 2**12


def _positive_int(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    return value


@dataclass(frozen=True)
class PyramidGeometry:
    """Sizes of an Expert Pyramid Tuning layer (arXiv 2603.12577).

    Args:
        in_features: width of the layer's input.
        out_features: width of its output.
        rank: rank ``r`` of the shared seed ``Z = B @ A``.
        kernel_sizes: scale ``k_e`` of every expert, in their order; repeats are experts of the same scale.
        alp_scaling: multiply scale ``k`` by ``h_k / h`` (the share of the seed's rows that it uses).

    Attributes (derived):
        scales: the distinct kernel sizes, ascending; ``S`` of them.
        experts_per_scale: how many experts have each of ``scales``.
        widths, heights: columns of ``A`` and rows of ``B`` that a scale reads, ``ceil(in / k)`` and ``ceil(out / k)``.
        alp_factors: the dimension-aware scale ``s_k`` of each scale.
        offsets: where each scale's ``k * k`` block starts in a packed folded kernel ``[G, folded_size]``.
        columns: where each scale's ``r * k`` block starts in a row of intermediates ``[T, shrink_size]``.
        factor_shapes, kernel_shapes: of A and B, and of the kernels in their order.
        seed_width, seed_height: ``A`` is ``[rank, seed_width]``, ``B`` is ``[seed_height, rank]``.

    Raises:
        ValueError: a size is not a positive integer, ``kernel_sizes`` is empty or too long, or a scale is larger than
            the layer.
    """

    in_features: int
    out_features: int
    rank: int
    kernel_sizes: tuple[int, ...]
    alp_scaling: bool = True

    scales: tuple[int, ...] = field(init=False, compare=False)
    experts_per_scale: tuple[int, ...] = field(init=False, compare=False)
    widths: tuple[int, ...] = field(init=False, compare=False)
    heights: tuple[int, ...] = field(init=False, compare=False)
    alp_factors: tuple[float, ...] = field(init=False, compare=False)
    offsets: tuple[int, ...] = field(init=False, compare=False)
    columns: tuple[int, ...] = field(init=False, compare=False)
    folded_size: int = field(init=False, compare=False)
    shrink_size: int = field(init=False, compare=False)
    seed_width: int = field(init=False, compare=False)
    seed_height: int = field(init=False, compare=False)
    factor_shapes: tuple[tuple[int, int], tuple[int, int]] = field(init=False, compare=False)
    kernel_shapes: tuple[tuple[int, int], ...] = field(init=False, compare=False)
    _hash: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        _positive_int("in_features", self.in_features)
        _positive_int("out_features", self.out_features)
        _positive_int("rank", self.rank)
        sizes = check_kernel_sizes(self.kernel_sizes)
        if not isinstance(self.alp_scaling, bool):
            raise ValueError(f"alp_scaling must be True or False, got {self.alp_scaling!r}")
        smaller = min(self.in_features, self.out_features)
        if max(sizes) > smaller:
            raise ValueError(
                f"kernel_sizes holds the scale {max(sizes)}, larger than the layer it adapts "
                f"(in_features={self.in_features}, out_features={self.out_features}); allowed: 1 to {smaller}"
            )
        scales = tuple(sorted(set(sizes)))
        widths = tuple(-(-self.in_features // k) for k in scales)
        heights = tuple(-(-self.out_features // k) for k in scales)
        derived = {
            "kernel_sizes": sizes,
            "scales": scales,
            "experts_per_scale": tuple(sizes.count(k) for k in scales),
            "widths": widths,
            "heights": heights,
            "alp_factors": tuple(h / heights[0] if self.alp_scaling else 1.0 for h in heights),
            "offsets": tuple(sum(k * k for k in scales[:s]) for s in range(len(scales))),
            "columns": tuple(self.rank * sum(scales[:s]) for s in range(len(scales))),
            "folded_size": sum(k * k for k in scales),
            "shrink_size": self.rank * sum(scales),
            "seed_width": widths[0],
            "seed_height": heights[0],
            "factor_shapes": ((self.rank, widths[0]), (heights[0], self.rank)),
            "kernel_shapes": tuple((k, k) for k in sizes),
            "_hash": hash((self.in_features, self.out_features, self.rank, sizes, self.alp_scaling)),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def __hash__(self) -> int:
        return self._hash  # computed once: every eager call looks something up by its geometry

    @property
    def num_experts(self) -> int:
        return len(self.kernel_sizes)

    @property
    def expert_scale(self) -> tuple[int, ...]:
        """Index into ``scales`` of every expert."""
        return tuple(self.scales.index(k) for k in self.kernel_sizes)

    @property
    def num_parameters(self) -> int:
        """Trainable numbers in the seed and the kernels, without gate and task embeddings."""
        return self.rank * (self.seed_width + self.seed_height) + sum(k * k for k in self.kernel_sizes)


def check_kernel_sizes(kernel_sizes: Sequence[int]) -> tuple[int, ...]:
    """Return ``kernel_sizes`` as a tuple of integers >= 1, or raise a ValueError that names the argument."""
    try:
        sizes = tuple(islice(kernel_sizes, MOST_EXPERTS + 1))
    except TypeError:
        raise ValueError(f"kernel_sizes must be a sequence of integers >= 1, got {kernel_sizes!r}") from None
    if not sizes:
        raise ValueError("kernel_sizes must name at least one expert, got an empty sequence")
    if len(sizes) > MOST_EXPERTS:
        raise ValueError(f"kernel_sizes must name at most {MOST_EXPERTS} experts, got more")
    for size in sizes:
        _positive_int("every entry of kernel_sizes", size)
    return sizes
