"""The ops on Triton kernels: what is launched, and in which order.

Forward: shrink, then the base product with the expansion in its accumulator; or all of it in a single launch; or
torch's product and an expansion added to it (``base_plan`` says which). Backward, at most five launches: shrink of x
again (U and V: forward keeps neither, x is all that a layer holds), shrink of dy, dx, first stage of dA and dB, second
stage of all parameter gradients.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .configs import row_spans
from .expand import expand
from .factor_grad import Side, Units, factor_grad_partials
from .linear import linear
from .plan import Plan, plan_for
from .reduce import reduce_gradients
from .shrink import shrink
from .single import shrink_linear
from .target import is_amd, on_its_device
from .weight import merge as pyramid_merge
from .weight import pyramid_weight
from .weight_grad import pyramid_weight_backward

__all__ = [
    "PLANS",
    "base_plan",
    "pyramid_delta",
    "pyramid_delta_backward",
    "pyramid_linear",
    "pyramid_linear_backward",
    "pyramid_merge",
    "pyramid_weight",
    "pyramid_weight_backward",
]

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


#: How the base product and the adapter share launches; ``EPT_TRITON_BASE`` accepts these.
PLANS = ("fused", "single", "split")


def base_plan(x: Tensor, weight: Tensor) -> str:
    """How the base product runs: ``fused`` (our kernel, the expansion in its accumulator, after a shrink), ``single``
    (the shrink in the same launch too) or ``split`` (torch's library, then an expansion added to its output).

    Fused, y is written once; apart, the library's faster product is followed by a kernel that reads and writes y again.
    The rule: fused for half precision where rows are 16-byte multiples (the kernel's loads are then full vectors);
    apart for fp32 (the library is well ahead there) and for ragged rows. ``single`` moves the fewest bytes but its
    programs wait for each other, and no GPU has timed it yet: it runs only where ``EPT_TRITON_BASE`` asks for it.

    Raises:
        ValueError: ``EPT_TRITON_BASE`` names no such plan, or ``single`` on an AMD GPU.
    """
    forced = os.environ.get("EPT_TRITON_BASE") or None
    if forced not in (None, *PLANS):
        raise ValueError(f"EPT_TRITON_BASE must be one of {', '.join(PLANS)}, or unset to choose, got {forced!r}")
    if forced == "single" and is_amd():
        raise ValueError("EPT_TRITON_BASE=single is for NVIDIA: on AMD its flags may overtake the rows they announce")
    if forced is not None:
        return forced
    return "fused" if x.dtype.itemsize <= 2 and all(size % 16 == 0 for size in weight.shape) else "split"


@on_its_device
def pyramid_delta(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    folded: Tensor,
    groups: Tensor | None,
    out_features: int,
    scales: Sequence[int],
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    active: Tensor | None = None,
) -> Tensor:
    plan = plan_for(A.shape[0], tuple(scales))
    options = {"skip": True, "uses": _packed(active), "dropout": (dropout_p, seed)}
    _, v, bits, _, _ = shrink(x, A, folded.contiguous(), _packed(groups), plan, **options)
    return expand(x.new_empty(x.shape[0], out_features), v, bits, B.T, plan, accumulate=False)


@on_its_device
def pyramid_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    folded: Tensor,
    groups: Tensor | None,
    scales: Sequence[int],
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    active: Tensor | None = None,
) -> Tensor:
    plan, way = plan_for(A.shape[0], tuple(scales)), base_plan(x, weight)
    folded, groups = folded.contiguous(), _packed(groups)
    options = {"skip": True, "uses": _packed(active), "dropout": (dropout_p, seed)}
    packed_bias = None if bias is None else bias.contiguous()
    if way == "single":
        y, *_ = shrink_linear(x, weight, packed_bias, A, B.T, folded, groups, plan, **options)
        return y
    _, v, bits, _, _ = shrink(x, A, folded, groups, plan, **options)
    if way == "fused":
        return linear(x, weight, packed_bias, v, bits, B.T, plan)
    return expand(F.linear(x, weight, bias).contiguous(), v, bits, B.T, plan, accumulate=True)


@on_its_device
def pyramid_delta_backward(
    grad: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    folded: Tensor,
    groups: Tensor | None,
    scales: Sequence[int],
    needs: Sequence[bool],
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    active: Tensor | None = None,
) -> Gradients:
    return _backward(grad, x, None, A, B, folded, groups, scales, needs, (dropout_p, seed), active)


@on_its_device
def pyramid_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    folded: Tensor,
    groups: Tensor | None,
    scales: Sequence[int],
    needs: Sequence[bool],
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    active: Tensor | None = None,
) -> Gradients:
    return _backward(grad, x, weight, A, B, folded, groups, scales, needs, (dropout_p, seed), active)


def _packed(table: Tensor | None) -> Tensor | None:
    return None if table is None else table.contiguous()


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    A: Tensor,
    B: Tensor,
    folded: Tensor,
    groups: Tensor | None,
    scales: Sequence[int],
    needs: Sequence[bool],
    dropout: tuple[float, Tensor | None],
    active: Tensor | None,
) -> Gradients:
    """Gradients of x, A, B, folded, each only where ``needs`` asks."""
    need_x, need_A, need_B, need_folded = needs
    if not any(needs):
        return None, None, None, None
    plan = plan_for(A.shape[0], tuple(scales))
    folded, groups = folded.contiguous(), _packed(groups)
    grad_x = side_a = side_b = units = u = rows = None
    which = {"skip": not need_folded, "uses": _packed(active)}  # without ``active`` every kernel's gradient is wanted
    if need_B or need_folded:
        u, v, bits, _, _ = shrink(
            x, A, folded, groups, plan, **which, keep_u=need_folded, keep_v=need_B, dropout=dropout
        )
        side_b = Side(grad, v, bits) if need_B else None
    options = {**which, "transpose": True, "u_saved": u if need_folded else None}
    partial_folded = None
    if need_x and weight is not None and base_plan(grad, weight) == "single":
        grad_x, du, bits, partial_folded, rows = shrink_linear(
            grad, weight.T, None, B.T, A, folded, groups, plan, **options, dropout=dropout, drop_output=True
        )
        side_a = Side(x, du, bits) if need_A else None
    elif need_x or need_A or need_folded:
        _, du, bits, partial_folded, rows = shrink(grad, B.T, folded, groups, plan, **options, keep_v=need_x or need_A)
        grad_x = _grad_x(grad, x.shape[1], weight, A, du, bits, plan, dropout) if need_x else None
        side_a = Side(x, du, bits) if need_A else None
    grad_A = torch.empty_like(A) if need_A else None
    grad_B = torch.empty_like(B) if need_B else None
    grad_folded = torch.empty_like(folded) if need_folded else None
    summed = {} if rows is None else {"groups": groups, "units_per_segment": rows.units_per_segment}
    summed["uses"] = which["uses"]
    if need_folded and not rows.aligned and row_spans(rows.rows)[1] > 1:  # too many units for one stage
        units = Units(partial_folded, groups, which["uses"], len(folded))
    partial_a = partial_b = None
    if need_A or need_B or units is not None:
        partial_a, partial_b, spans_of_folded = factor_grad_partials(side_a, side_b, units, plan, dropout=dropout)
        if units is not None:
            partial_folded, summed = spans_of_folded, {}
    if need_A or need_B or need_folded:
        reduce_gradients(
            plan,
            partial_a=partial_a,
            grad_a=grad_A,
            partial_b=partial_b,
            grad_b=None if grad_B is None else grad_B.T,
            partial_folded=partial_folded,
            grad_folded=grad_folded,
            **summed,
        )
    return grad_x, grad_A, grad_B, grad_folded


def _grad_x(
    grad: Tensor,
    in_features: int,
    weight: Tensor | None,
    A: Tensor,
    du: Tensor,
    bits: Tensor,
    plan: Plan,
    dropout: tuple[float, Tensor | None],
) -> Tensor:
    """``dy W`` (where there is a base) and the expanded rows of dU."""
    if weight is None:
        rows = grad.new_empty(grad.shape[0], in_features)
        return expand(rows, du, bits, A, plan, accumulate=False, dropout=dropout)
    if base_plan(grad, weight) == "fused":
        return linear(grad, weight.T, None, du, bits, A, plan, dropout=dropout)
    return expand((grad @ weight).contiguous(), du, bits, A, plan, accumulate=True, dropout=dropout)
