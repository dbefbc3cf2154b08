"""The ops on rows as plain matrix products around four small kernels (plan ``library``).

With ``W = r * sum(k)`` columns, ordered by scale, rank and slot, and the interleaved factors of ``SmallKernels``:

    forward     U = x Ahat^T             V = core(U)             y = x W0^T + b,  y += V Bhat
    backward    dV = dy Bhat^T           dU = core^T(dV)         dx = dy W0,      dx += dU Ahat
                dAhat = dU^T x           dBhat = V^T dy          dA, dB = gather(dAhat, dBhat)

The products run on the vendor's library. A backend supplies the small kernels: in plain torch (``backends.torch``), in
Triton or in CUDA C++. Forward keeps U ``[T, W]`` and the interleaved factors for the backward: at 8192 rows of bf16 and
rank 8 that is 2.6 MB and, at 4096 x 4096, 2.6 MB more. ``EPT_RECOMPUTE=1`` keeps neither. Nothing here depends on
values: no host synchronisation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..problem import Base, Gradients, Kept, Output, Problem, Stamp, captures


class SmallKernels(Protocol):
    """What a backend supplies; arguments as in ``problem.Problem``."""

    def interleave(
        self, A: Tensor, B: Tensor, in_features: int, out_features: int, scales: Sequence[int], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """``Ahat[(k, p, q), c] = A[p, c // k] (c % k == q)  [W, in]`` and ``Bhat[(k, p, a), o] = B[o // k, p]
        (o % k == a)  [W, out]``.
        """

    def core(
        self, U: Tensor, folded: Tensor, groups: Tensor | None, active: Tensor | None, scales: Sequence[int]
    ) -> Tensor:
        """``V[t, (k, p, a)] = sum_q Kbar_k[g(t)][a, q] U[t, (k, p, q)]``, ``[T, W]`` in the dtype of U."""

    def core_backward(
        self,
        U: Tensor | None,
        dV: Tensor | None,
        folded: Tensor,
        groups: Tensor | None,
        active: Tensor | None,
        scales: Sequence[int],
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """V as ``core`` gave it, ``dU[t, (k, p, q)] = sum_a Kbar_k[g(t)][a, q] dV[t, (k, p, a)]`` and the gradient of
        ``folded``, ``sum_{t in g, p} dV[t, (k, p, a)] U[t, (k, p, q)]``, in fp32 or wider; each where ``needs`` asks.
        """

    def gather(
        self,
        grad_A_hat: Tensor | None,
        grad_B_hat: Tensor | None,
        rank: int,
        seed_width: int,
        seed_height: int,
        scales: Sequence[int],
    ) -> tuple[Tensor | None, Tensor | None]:
        """The adjoint of ``interleave``: ``[r, w]`` and ``[h, r]`` in fp32 or wider."""

    def dropout(self, x: Tensor, seed: Tensor, p: float, onto: Tensor | None = None) -> Tensor:
        """x with entries dropped as ``seed [1]`` says, the others divided by ``1 - p``; or that added to ``onto``."""


class _Update(NamedTuple):
    """``left [T, W] right [W, out]`` is the adapter's output; the rest is what the backward may use again."""

    left: Tensor
    right: Tensor
    U: Tensor
    A_hat: Tensor
    B_hat: Tensor


class _Factors(NamedTuple):
    """Interleaved factors that inference keeps; and, of the one kernel used last, ``right = Kbar Bhat``."""

    stamp: Stamp
    A_hat: Tensor
    B_hat: Tensor
    folded: Stamp | None = None
    right: Tensor | None = None


#: ``(x, weight, bias, V, hat) -> x weight^T + bias + V hat``: the two products of forward, and of the gradient of x.
Products = Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor], Tensor]


def two_products(x: Tensor, weight: Tensor, bias: Tensor | None, V: Tensor, hat: Tensor) -> Tensor:
    """The base product, then the update added to it in place."""
    return F.linear(x, weight, bias).addmm_(V, hat)


def _sum_over_rows(left: Tensor, right: Tensor) -> Tensor:
    """``left^T right`` of ``[T, W]`` and ``[T, n]``, not rounded to half where the library can do that."""
    if left.dtype.itemsize > 2:
        return left.T @ right
    if not left.is_cuda:
        return left.T.float() @ right.float()
    if _HAS_OUT_DTYPE:
        return torch.mm(left.T, right, out_dtype=torch.float32)
    return left.T @ right


_HAS_OUT_DTYPE = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)


def _computed(folded: Tensor, rows: torch.dtype) -> Tensor:
    """Folded kernels as the small kernels read them: fp32, or fp64 beside rows of that."""
    return folded.to(torch.promote_types(rows, torch.float32)).contiguous()


def _like(gradient: Tensor | None, tensor: Tensor) -> Tensor | None:
    return None if gradient is None else gradient.to(tensor.dtype)


class Library:
    """The ops of a backend (``problem.Backend``).

    Args:
        kernels: the backend's small kernels, a module or an object.
        products: how the base product and the update are added; ``two_products`` unless a backend fuses them.
    """

    def __init__(self, kernels: SmallKernels, products: Products = two_products) -> None:
        self.kernels = kernels
        self.products = products

    def forward(self, problem: Problem, base: Base | None, save: bool = False, kept: Kept | None = None) -> Output:
        update = self._update(problem, kept)
        left, right, *saved = update
        y = left @ right if base is None else self.products(problem.x, base.weight, base.bias, left, right)
        return Output(y, *saved) if save else Output(y)

    def _update(self, problem: Problem, kept: Kept | None) -> _Update:
        x, folded, groups, active, scales = self._dropped(problem), *problem[3:6], problem.scales
        folded = _computed(folded, x.dtype)
        factors = None if kept is None or captures(x) else self._kept_factors(problem, kept)
        if factors is None:
            A_hat, B_hat = self._interleave(problem)
        else:
            A_hat, B_hat = factors.A_hat, factors.B_hat
        U = x @ A_hat.T
        if kept is not None and factors is not None and groups is None and len(folded) == 1:
            return _Update(U, self._folded_right(kept, factors, folded, scales), U, A_hat, B_hat)
        return _Update(self.kernels.core(U, folded, groups, active, scales), B_hat, U, A_hat, B_hat)

    def _dropped(self, problem: Problem) -> Tensor:
        """What the adapter sees of x."""
        if problem.seed is None:
            return problem.x
        return self.kernels.dropout(problem.x, problem.seed, problem.dropout_p)

    def _interleave(self, problem: Problem) -> tuple[Tensor, Tensor]:
        x, A, B = problem[:3]
        return self.kernels.interleave(A, B, x.shape[1], problem.out_features, problem.scales, x.dtype)

    def _kept_factors(self, problem: Problem, kept: Kept) -> _Factors | None:
        """The interleaved factors, made anew where A or B has changed; None where that cannot be told."""
        known: _Factors | None = kept.value
        if known is not None and known.A_hat.dtype == problem.x.dtype and known.stamp.holds(problem.A, problem.B):
            return known
        stamp = Stamp.of(problem.A, problem.B)
        if stamp is not None:
            kept.value = _Factors(stamp, *self._interleave(problem))
            return kept.value
        return None

    def _folded_right(self, kept: Kept, factors: _Factors, folded: Tensor, scales: Sequence[int]) -> Tensor:
        """``Bhat`` with the one folded kernel applied to it, so that ``y += U right``: no core in between."""
        if factors.right is not None and factors.folded is not None and factors.folded.holds(folded):
            return factors.right
        asked = (False, True, False)
        _, turned, _ = self.kernels.core_backward(None, factors.B_hat.T.contiguous(), folded, None, None, scales, asked)
        assert turned is not None
        right = turned.T
        if (stamp := Stamp.of(folded)) is not None:
            kept.value = factors._replace(folded=stamp, right=right)
        return right

    def backward(
        self, grad: Tensor, problem: Problem, weight: Tensor | None, needs: Sequence[bool], saved: Sequence[Tensor] = ()
    ) -> Gradients:
        need_x, need_A, need_B, need_folded = needs
        need_dU = need_x or need_A
        if not (need_dU or need_B or need_folded):
            return None, None, None, None
        kernels, x, A, B = self.kernels, *problem[:3]
        folded, groups, active, scales = *problem[3:6], problem.scales
        U, A_hat, B_hat = saved or (None, *self._interleave(problem))
        dropped = x
        if need_A or (U is None and (need_B or need_folded)):
            dropped = self._dropped(problem)
        if U is None and (need_B or need_folded):
            U = dropped @ A_hat.T
        dV = grad @ B_hat.T if need_dU or need_folded else None
        asked = (need_B, need_dU, need_folded)
        V, dU, grad_folded = kernels.core_backward(U, dV, _computed(folded, x.dtype), groups, active, scales, asked)
        grad_x = self._grad_x(grad, problem, weight, dU, A_hat) if need_x and dU is not None else None
        grad_A, grad_B = kernels.gather(
            _sum_over_rows(dU, dropped) if need_A and dU is not None else None,
            _sum_over_rows(V, grad) if V is not None else None,
            A.shape[0],
            A.shape[1],
            B.shape[0],
            scales,
        )
        return grad_x, _like(grad_A, A), _like(grad_B, B), _like(grad_folded, folded)

    def _grad_x(self, grad: Tensor, problem: Problem, weight: Tensor | None, dU: Tensor, A_hat: Tensor) -> Tensor:
        if problem.seed is None:
            return dU @ A_hat if weight is None else self.products(grad, weight.T, None, dU, A_hat)
        base = None if weight is None else grad @ weight
        return self.kernels.dropout(dU @ A_hat, problem.seed, problem.dropout_p, onto=base)

    def delta_weight(
        self, A: Tensor, B: Tensor, folded: Tensor, in_features: int, out_features: int, scales: Sequence[int]
    ) -> Tensor:
        """The dense update of every group, ``[G, out, in]``: what ``forward`` does to the rows of an identity."""
        A_hat, B_hat = self.kernels.interleave(A, B, in_features, out_features, scales, A.dtype)
        U, groups = _of_identity(A_hat, folded)
        V = self.kernels.core(U, _computed(folded, A.dtype), groups, None, scales)
        return B_hat.T @ V.view(len(folded), in_features, len(A_hat)).mT

    def delta_weight_backward(
        self, grad: Tensor, A: Tensor, B: Tensor, folded: Tensor, scales: Sequence[int], needs: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of A, B and folded from that of the dense updates, ``grad [G, out, in]``."""
        need_A, need_B, need_folded = needs
        if not (need_A or need_B or need_folded):
            return None, None, None
        groups_of_grad, out_features, in_features = grad.shape
        A_hat, B_hat = self.kernels.interleave(A, B, in_features, out_features, scales, A.dtype)
        U, groups = _of_identity(A_hat, folded)
        rows = grad.mT.reshape(groups_of_grad * in_features, out_features)
        dV = rows @ B_hat.T if need_A or need_folded else None
        asked = (need_B, need_A, need_folded)
        V, dU, grad_folded = self.kernels.core_backward(U, dV, _computed(folded, A.dtype), groups, None, scales, asked)
        grad_A, grad_B = self.kernels.gather(
            None if dU is None else dU.view(groups_of_grad, in_features, len(A_hat)).sum(0).T.contiguous(),
            None if V is None else _sum_over_rows(V, rows),
            A.shape[0],
            A.shape[1],
            B.shape[0],
            scales,
        )
        return _like(grad_A, A), _like(grad_B, B), _like(grad_folded, folded)


def _of_identity(A_hat: Tensor, folded: Tensor) -> tuple[Tensor, Tensor | None]:
    """U of the rows of an identity, once for every group, and the groups."""
    count = len(folded)
    groups = None if count == 1 else torch.arange(count, device=folded.device)
    return A_hat.T.repeat(count, 1), groups
