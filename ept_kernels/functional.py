"""The public functions: validate, flatten rows, follow autocast, call the op."""

from __future__ import annotations

import math
from operator import attrgetter

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from . import ops as _ops  # noqa: F401  (registers torch.ops.ept)
from .autocast import autocast_dtype, without_autocast
from .dispatch import backend_for
from .eager import call
from .geometry import PyramidGeometry
from .kept import Kept

_FLOATS = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_layout, _dtype, _device = attrgetter("layout"), attrgetter("dtype"), attrgetter("device")


def _are_sound(floats: dict[str, Tensor | None], groups: Tensor | None, active: Tensor | None) -> bool:
    """Whether all is as ``_check_tensors`` wants it. By ``map``: a small layer would notice a loop."""
    numbers = [tensor for name, tensor in floats.items() if tensor is not None or name != "bias"]
    tensors = numbers + [tensor for tensor in (groups, active) if tensor is not None]
    return (
        _PLAIN.issuperset(map(type, tensors))
        and {*map(_layout, tensors)} == {torch.strided}
        and _FLOATS.issuperset(map(_dtype, numbers))
        and len({*map(_device, tensors)}) == 1
    )


def _check_tensors(
    geometry: PyramidGeometry, groups: Tensor | None, active: Tensor | None, **floats: Tensor | None
) -> None:
    """What backends take on trust: dense tensors on one device, numbers in a dtype that they compute in."""
    if not isinstance(geometry, PyramidGeometry):
        raise TypeError(f"geometry must be a PyramidGeometry, got {type(geometry).__name__}")
    if not torch.compiler.is_compiling() and _are_sound(floats, groups, active):
        return
    device = None
    for name, tensor in (*floats.items(), ("groups", groups), ("active", active)):
        if tensor is None and name in ("bias", "groups", "active"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.layout is not torch.strided:
            raise ValueError(f"{name} must be a dense tensor, got one of layout {tensor.layout}")
        if name in floats and tensor.dtype not in _FLOATS:
            raise ValueError(f"{name} must be a floating-point tensor, got {tensor.dtype}; allowed: 16 to 64 bits")
        if device is None:
            device, first = tensor.device, name
        elif tensor.device != device:
            raise ValueError(f"{name} must be on the device of {first}, {device}, got {tensor.device}")


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be {meaning} {list(shape)}, got {list(tensor.shape)}")


def _check_adapter(A: Tensor, B: Tensor, folded: Tensor, geometry: PyramidGeometry) -> None:
    _expect("A", A, (geometry.rank, geometry.seed_width), "[r, ceil(in / k_min)] =")
    _expect("B", B, (geometry.seed_height, geometry.rank), "[ceil(out / k_min), r] =")
    if folded.dim() != 2 or folded.shape[1] != geometry.folded_size:
        raise ValueError(f"folded must be [groups, {geometry.folded_size}], got {list(folded.shape)}")
    if A.dtype != B.dtype:
        raise ValueError(f"A and B must have one dtype, got {A.dtype} and {B.dtype}")


def _check_rows(x: Tensor, folded: Tensor, groups: Tensor | None, geometry: PyramidGeometry) -> None:
    if x.dim() == 0 or x.shape[-1] != geometry.in_features:
        raise ValueError(f"x must be [..., in_features={geometry.in_features}], got {list(x.shape)}")
    if groups is None:
        if folded.shape[0] != 1:
            raise ValueError(f"groups may be None only for one folded kernel, got {folded.shape[0]} of them")
        return
    if groups.dim() != 1 or groups.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"groups must be a 1-D tensor of int64 or int32, got {list(groups.shape)} of {groups.dtype}")
    rows, count = math.prod(x.shape[:-1]), groups.shape[0]  # Size.numel() is fixed when exported
    if rows and not folded.shape[0]:
        raise ValueError(f"folded must hold a kernel for the {rows} rows of x, got {list(folded.shape)}")
    if rows % count if count else rows:
        raise ValueError(f"groups must have a length that divides the {rows} rows of x, got {count}")


def _refuse_tangents(*tensors: Tensor | None) -> None:
    """Below autograd the ops would drop a tangent without a word."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError("the ept ops have no forward-mode derivative (torch.autograd.forward_ad, jvp)")


def _check_options(dropout_p: float, active: Tensor | None, folded: Tensor, geometry: PyramidGeometry) -> None:
    if not isinstance(dropout_p, (int, float)) or not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p!r}")
    if active is not None:
        _expect("active", active, (folded.shape[0], len(geometry.scales)), "[groups, scales] =")
        if active.dtype != torch.bool:
            raise ValueError(f"active must be a bool tensor, got {active.dtype}")


@torch.compiler.assume_constant_result
def _fuses_dropout(device: torch.device, dtype: torch.dtype) -> bool:
    return getattr(backend_for(device, dtype), "fuses_dropout", False)


def _dropout_seed(x: Tensor) -> Tensor:
    """``[1]`` int64 from torch's generator on the device of x, so that recomputation replays the mask; no host read."""
    return torch.randint(2**62, (1,), device=x.device)


def pyramid_weight(A: Tensor, B: Tensor, folded: Tensor, geometry: PyramidGeometry) -> Tensor:
    """Dense update of every group, ``sum_k crop((B_k A_k) kron Kbar_k[g])`` (spec identity 5).

    Args:
        A: ``[r, ceil(in / k_min)]``, B: ``[ceil(out / k_min), r]``, one floating dtype.
        folded: ``[G, folded_size]``, packed as ``fold_kernels`` packs.
        geometry: the layer's sizes.

    Returns:
        ``[G, out, in]`` in the dtype of A, differentiable once in A, B and folded.

    Raises:
        ValueError: a shape or dtype that does not fit the geometry, tensors on several devices or not dense.
        TypeError: neither a tensor nor a geometry.
    """
    _check_tensors(geometry, None, None, A=A, B=B, folded=folded)
    _check_adapter(A, B, folded, geometry)
    _refuse_tangents(A, B, folded)
    with without_autocast(A.device):  # a merge is exact in the dtype of A, whatever surrounds it
        return torch.ops.ept.pyramid_weight(
            A, B, folded, geometry.in_features, geometry.out_features, list(geometry.scales)
        )


def pyramid_merge(weight: Tensor, A: Tensor, B: Tensor, folded: Tensor, geometry: PyramidGeometry) -> Tensor:
    """A base weight with each group's update added, ``W0 + sum_k crop((B_k A_k) kron Kbar_k[g])`` (spec identity 5).

    For inference: there is no gradient. ``weight + pyramid_weight(...)`` has one.

    Args:
        weight: ``[out, in]``, any floating dtype and strides; it is read, never written.
        A: ``[r, ceil(in / k_min)]``, B: ``[ceil(out / k_min), r]``, one floating dtype.
        folded: ``[G, folded_size]``, packed as ``fold_kernels`` packs.
        geometry: the layer's sizes.

    Returns:
        ``[G, out, in]`` in the dtype of weight: summed in fp32 or wider, rounded once.

    Raises:
        ValueError: a shape or dtype that does not fit the geometry, tensors on several devices or not dense.
        TypeError: neither a tensor nor a geometry.
        RuntimeError: an input requires a gradient and autograd is on.
    """
    _check_tensors(geometry, None, None, weight=weight, A=A, B=B, folded=folded)
    _check_adapter(A, B, folded, geometry)
    _expect("weight", weight, (geometry.out_features, geometry.in_features), "[out, in] =")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (weight, A, B, folded)):
        raise RuntimeError(
            "pyramid_merge has no gradient; call it under torch.no_grad(), or add pyramid_weight to the weight"
        )
    with without_autocast(weight.device):
        return torch.ops.ept.pyramid_merge(weight, A, B, folded, list(geometry.scales))


def pyramid_delta(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    folded: Tensor,
    groups: Tensor | None,
    geometry: PyramidGeometry,
    *,
    dropout_p: float = 0.0,
    active: Tensor | None = None,
    kept: Kept | None = None,
) -> Tensor:
    """The adapter's output for any base layer (spec section 2): ``sum_k B_k (A_k X) Kbar_k[g]^T``.

    Args:
        x: ``[..., in]``, any floating dtype; rows are its leading dimensions in row-major order.
        A: ``[r, ceil(in / k_min)]``, B: ``[ceil(out / k_min), r]``; fp32 beside half inputs is usual.
        folded: ``[G, folded_size]``, packed as ``fold_kernels`` packs, already holding ``alpha / r``, ALP and gates.
        groups: ``[N]`` rows of ``folded``, one for every ``T / N`` consecutive rows of x (N = 1, the batch, or T); None
            with G = 1.
        geometry: the layer's sizes.
        dropout_p: probability with which an entry of x is zero, in [0, 1); the others are divided by 1 - p. Drawn from
            torch's generator.
        active: ``[G, S]`` bool, whether a group uses an expert of each of ``geometry.scales``; None: whether it does is
            not known. Where False, the kernel in ``folded`` must be zero; its gradient is zero then, and not computed.
        kept: of a layer, for calls without gradients on a GPU: what follows from A, B and folded is kept there until
            one of them changes (``Stamp``).

    Returns:
        ``[..., out]`` in the dtype of x (autocast's, where that is on), differentiable once in x, A, B and folded.

    Raises:
        ValueError: a shape or dtype that does not fit, tensors on several devices or not dense, groups that do not
            divide the rows, dropout_p out of range.
        TypeError: neither a tensor nor a geometry.
        IndexError: on a CPU, a group that ``folded`` lacks; on a GPU the backend's device assertion, where it has one.
    """
    _check_tensors(geometry, groups, active, x=x, A=A, B=B, folded=folded)
    _check_adapter(A, B, folded, geometry)
    _check_rows(x, folded, groups, geometry)
    _check_options(dropout_p, active, folded, geometry)
    _refuse_tangents(x, A, B, folded)
    dtype = autocast_dtype(x)
    if dtype is not None:
        with without_autocast(x.device):
            return pyramid_delta(
                x.to(dtype), A, B, folded, groups, geometry, dropout_p=dropout_p, active=active, kept=kept
            )
    seed = None
    if dropout_p > 0:
        if _fuses_dropout(x.device, x.dtype):
            seed = _dropout_seed(x)
        else:
            x = F.dropout(x, dropout_p)
    rows = x.reshape(-1, geometry.in_features)
    delta = call(
        "pyramid_delta",
        rows,
        A,
        B,
        folded,
        groups,
        geometry.out_features,
        list(geometry.scales),
        dropout_p,
        seed,
        active,
        kept=kept,
    )
    return delta.view(*x.shape[:-1], geometry.out_features)


def pyramid_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    folded: Tensor,
    groups: Tensor | None,
    geometry: PyramidGeometry,
    *,
    dropout_p: float = 0.0,
    active: Tensor | None = None,
    kept: Kept | None = None,
) -> Tensor:
    """``x @ weight.T + bias`` and the adapter's output in one call; the rest as in ``pyramid_delta``.

    Dropout acts on what the adapter sees, not on the base product.

    Args:
        weight: ``[out, in]`` in the dtype of x. bias: ``[out]`` or None.

    Returns:
        ``[..., out]`` in the dtype of x (autocast's, where that is on).

    Raises:
        ValueError: as ``pyramid_delta``, and a weight or bias of another shape or dtype.
    """
    _check_tensors(geometry, groups, active, x=x, weight=weight, bias=bias, A=A, B=B, folded=folded)
    _check_adapter(A, B, folded, geometry)
    _check_rows(x, folded, groups, geometry)
    _check_options(dropout_p, active, folded, geometry)
    _refuse_tangents(x, weight, bias, A, B, folded)
    _expect("weight", weight, (geometry.out_features, geometry.in_features), "[out, in] =")
    if bias is not None:
        _expect("bias", bias, (geometry.out_features,), "[out] =")
    dtype = autocast_dtype(x)
    if dtype is not None:
        with without_autocast(x.device):
            cast_bias = None if bias is None else bias.to(dtype)
            return pyramid_linear(
                x.to(dtype),
                weight.to(dtype),
                cast_bias,
                A,
                B,
                folded,
                groups,
                geometry,
                dropout_p=dropout_p,
                active=active,
                kept=kept,
            )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(f"{name} must have the dtype of x, {x.dtype}, got {tensor.dtype}")
    seed = None
    if dropout_p > 0:
        if not _fuses_dropout(x.device, x.dtype):
            delta = pyramid_delta(F.dropout(x, dropout_p), A, B, folded, groups, geometry, active=active)
            return F.linear(x, weight, bias) + delta
        seed = _dropout_seed(x)
    rows = x.reshape(-1, geometry.in_features)
    output = call(
        "pyramid_linear",
        rows,
        weight,
        bias,
        A,
        B,
        folded,
        groups,
        list(geometry.scales),
        dropout_p,
        seed,
        active,
        kept=kept,
    )
    return output.view(*x.shape[:-1], geometry.out_features)
