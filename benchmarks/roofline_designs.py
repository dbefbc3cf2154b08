"""Which launches make which design, and what it costs over the frozen linear. The terms: ``roofline_model``."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from roofline_devices import Accelerator
from roofline_model import (
    Launch,
    Launches,
    Work,
    bound_backward,
    bound_forward,
    expand,
    gemm,
    gemm_expand,
    gemm_shrink_expand,
    reduce_gradients,
    seed_gradients,
    shrink,
    shrink_gradient,
)

# --- LoRA: plain products with r columns ------------------------------------------------------------------------------


def _product(work: Work, left: str, right: str, result: str) -> Launch:
    """A LoRA product: over tokens, rank and the features of whichever factor takes part."""
    sizes, g = _lora_sizes(work), work.geometry
    features = g.in_features if {"A", "dA"} & {left, right, result} else g.out_features
    reads = {left: sizes[left], right: sizes[right]}
    return Launch(f"{left} {right}", reads, {result: sizes[result]}, 2 * work.tokens * g.rank * features)


def _lora_sizes(work: Work) -> dict[str, int]:
    g, size, rank = work.geometry, work.size, work.geometry.rank
    x, y, u = work.tokens * g.in_features * size, work.tokens * g.out_features * size, work.tokens * rank * size
    a, b = rank * g.in_features * size, rank * g.out_features * size
    sizes = {"x": x, "dx": x, "y": y, "dy": y, "u": u, "du": u, "A": a, "dA": a, "B": b, "dB": b}
    return {**sizes, "delta": y, "scaled": y, "x delta": x}


def _map(work: Work, name: str, reads: Sequence[str], write: str) -> Launch:
    """A step without products: element by element."""
    sizes = _lora_sizes(work)
    return Launch(name, {tensor: sizes[tensor] for tensor in reads}, {write: sizes[write]})


def _accumulate(launch: Launch) -> Launch:
    """The same product added to its result, which must be read."""
    return Launch(launch.name, {**launch.reads, **launch.writes}, launch.writes, launch.flops)


def lora_forward(work: Work) -> Launches:
    return (
        gemm(work),
        _product(work, "x", "A", "u"),
        _accumulate(_product(work, "u", "B", "y")),
    )


def lora_peft_forward(work: Work) -> Launches:
    return (
        gemm(work),
        _product(work, "x", "A", "u"),
        _product(work, "u", "B", "delta"),
        _map(work, "scale", ("delta",), "scaled"),
        _map(work, "add", ("y", "scaled"), "y"),
    )


def _lora_gradients(work: Work, dy: str) -> Launches:
    return (
        _product(work, dy, "B", "du"),
        _product(work, dy, "u", "dB"),
        _product(work, "x", "du", "dA"),
    )


def lora_backward(work: Work) -> Launches:
    dx = _accumulate(_product(work, "du", "A", "dx"))
    return (*_lora_gradients(work, "dy"), gemm(work, backward=True), dx)


def lora_peft_backward(work: Work) -> Launches:
    return (
        _map(work, "scale", ("dy",), "scaled"),
        *_lora_gradients(work, "scaled"),
        _product(work, "du", "A", "x delta"),
        gemm(work, backward=True),
        _map(work, "add", ("dx", "x delta"), "dx"),
    )


# --- designs ----------------------------------------------------------------------------------------------------------


def linear_forward(work: Work) -> Launches:
    return (gemm(work),)


def linear_backward(work: Work) -> Launches:
    return (gemm(work, backward=True),)


def unfused_forward(work: Work) -> Launches:
    return shrink(work), gemm(work), expand(work)


def unfused_backward(work: Work) -> Launches:
    products = gemm(work, backward=True), expand(work, backward=True)
    return (shrink(work, keep_u=True), shrink_gradient(work), *products, seed_gradients(work), reduce_gradients(work))


def two_launch_forward(work: Work) -> Launches:
    return shrink(work), gemm_expand(work)


def one_launch_forward(work: Work) -> Launches:
    return (gemm_shrink_expand(work),)


def fused_backward(work: Work) -> Launches:
    return (
        shrink(work, keep_u=True),
        shrink_gradient(work),
        gemm_expand(work, backward=True),
        seed_gradients(work),
        reduce_gradients(work),
    )


def lowest_forward(work: Work) -> Launches:
    return (bound_forward(work),)


def lowest_backward(work: Work) -> Launches:
    return (bound_backward(work),)


@dataclass(frozen=True)
class Design:
    """A way to compute a layer.

    Attributes:
        forward, backward: its launches.
        fused: whether the target is asked of it.
        overlapped: whether a pass's launches run beside each other, so that one's memory traffic hides behind another's
            arithmetic: what a side stream or programmatic dependent launch could reach at the very best.
    """

    title: str
    forward: Callable[[Work], Launches]
    backward: Callable[[Work], Launches]
    fused: bool = False
    overlapped: bool = False


DESIGNS = {
    "linear": Design("frozen linear", linear_forward, linear_backward),
    "lora": Design("LoRA", lora_forward, lora_backward),
    "lora-peft": Design("LoRA, PEFT's eager code", lora_peft_forward, lora_peft_backward),
    "unfused": Design("EPT unfused", unfused_forward, unfused_backward),
    "two-launches": Design("EPT fused, two launches", two_launch_forward, fused_backward, fused=True),
    "one-launch": Design("EPT fused, one launch", one_launch_forward, fused_backward, fused=True),
    "overlapped": Design("the two launches, overlapped", two_launch_forward, fused_backward, overlapped=True),
    "bound": Design("lower bound of any EPT", lowest_forward, lowest_backward),
}


@dataclass(frozen=True)
class Estimate:
    """A design's launches in both passes, its floors in seconds, and those over the frozen linear's."""

    forward: Launches
    backward: Launches
    seconds: Mapping[str, float]
    ratios: Mapping[str, float]


PASSES = ("forward", "backward", "total")


def _pass_floor(launches: Launches, overlapped: bool, work: Work, device: Accelerator) -> float:
    if not overlapped:
        return sum(launch.floor(device, work.dtype) for launch in launches)
    moved, flops = sum(launch.bytes for launch in launches), sum(launch.flops for launch in launches)
    return max(moved / device.bandwidth, flops / device.rates[work.dtype])


def _seconds(design: Design, work: Work, device: Accelerator) -> dict[str, float]:
    passes = (design.forward(work), design.backward(work))
    forward, backward = (_pass_floor(launches, design.overlapped, work, device) for launches in passes)
    return {"forward": forward, "backward": backward, "total": forward + backward}


def estimate(name: str, work: Work, device: Accelerator) -> Estimate:
    """What ``DESIGNS[name]`` costs at least on ``device``."""
    design = DESIGNS[name]
    seconds, base = _seconds(design, work, device), _seconds(DESIGNS["linear"], work, device)
    ratios = {which: seconds[which] / base[which] for which in PASSES}
    return Estimate(design.forward(work), design.backward(work), seconds, ratios)


def active_sets(kernel_sizes: Sequence[int], top_k: int) -> dict[tuple[int, ...], float]:
    """Sets of distinct scales that ``top_k`` of the experts can use, with their share of all equally likely choices.

    In ascending order of the intermediates' size; the last is the worst case.

    Raises:
        ValueError: top_k is not from 1 to the number of experts.
    """
    if not 1 <= top_k <= len(kernel_sizes):
        raise ValueError(f"top_k must be from 1 to {len(kernel_sizes)}, the number of experts, got {top_k}")
    choices = Counter(tuple(sorted(set(chosen))) for chosen in itertools.combinations(kernel_sizes, top_k))
    return {active: choices[active] / choices.total() for active in sorted(choices, key=lambda a: (sum(a), a))}
