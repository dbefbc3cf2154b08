"""What the benchmark compares: ways to compute an adapted linear layer, each with its definition for the oracle.

==========  ==========================================================================================================
linear      the frozen ``nn.Linear``, what everything is measured against
lora        PEFT's LoRA, r = 8, no dropout, its parameters in the dtype of x
addmm       the same LoRA written by hand, as fast training libraries do: ``addmm_`` in forward and backward
lokr        PEFT's LoKr, r = 8: materialises ``torch.kron`` in every call
loop        EPT expert by expert, as its released code computes it: the product of the pruned factors, the product with
            x, a transposed convolution of the result, the weighted sum; the selected experts are read back to the host.
            (That code takes one task a batch; here the loop also runs over the tasks. That code uses the first
            ``in / k`` inputs alone; here all take part, as the paper defines it.)
dense       EPT through its dense update: ``ept_kernels.pyramid_weight`` for every task, then ``F.linear`` with
            ``W + update`` on the samples of each
compile     EPT in the structured form ``B_k (A_k X) Kbar_k^T``, written in plain torch, under ``torch.compile``
ept:NAME    ``ept.EPTLinear`` on backend NAME; ``ept:triton:PLAN`` on Triton with base product and update added as
            PLAN says (``library`` or ``fused``; without it the backend chooses, or ``EPT_GPU_PLAN``)
==========  ==========================================================================================================

Router and folding are part of every EPT candidate's time. Adapters are in evaluation mode, all parameters trainable.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from peft import LoKrConfig, LoraConfig, PeftConfig, get_peft_model
from problem import ALPHA, RANK, Problem
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ept_kernels import pyramid_weight, reference
from ept_kernels.dispatch import automatic

#: Trainable tensors by name; kernels are several.
Leaves = Mapping[str, Sequence[Tensor]]

TITLES = {
    "linear": "frozen nn.Linear",
    "lora": "PEFT LoRA r=8",
    "addmm": "LoRA r=8, addmm_",
    "lokr": "PEFT LoKr r=8",
    "loop": "EPT, expert by expert",
    "dense": "EPT, dense update",
    "compile": "EPT, torch.compile",
    "ept": "EPT",
}


def title(name: str) -> str:
    """A candidate's name for readers."""
    kind, _, backend = name.partition(":")
    return f"{TITLES[kind]} ({backend.replace(':', ', ')})" if backend else TITLES[kind]


@dataclass(frozen=True)
class Candidate:
    """One way to compute the layer.

    Attributes:
        name: key in results.
        backend: what computes it, in a word.
        forward: x -> y.
        leaves: trainable tensors whose gradients are compared with the definition's.
        definition: ``(x, weight, leaves) -> y`` in plain, differentiable torch, in any dtype.
        family: candidates of one family share leaves and definition.
        forced: what ``harness.forced_backend`` forces meanwhile.
        unchecked: trainable tensors that take part in the time alone (the router's: it is the same code everywhere).
    """

    name: str
    backend: str
    forward: Callable[[Tensor], Tensor]
    leaves: Leaves
    definition: Callable[[Tensor, Tensor, Leaves], Tensor]
    family: str
    forced: str | None = None
    unchecked: Sequence[Tensor] = field(default=())


# --- baselines without a pyramid --------------------------------------------------------------------------------------


def linear(problem: Problem) -> Candidate:
    return Candidate("linear", "torch", problem.base, {}, lambda x, weight, _: F.linear(x, weight), "linear")


def _peft_layer(problem: Problem, config: PeftConfig) -> nn.Module:
    """PEFT's layer around a linear that shares the frozen weight, in the dtype of x, no parameter zero."""
    base = nn.Linear(*reversed(problem.base.weight.shape), bias=False, device="meta")
    base.weight = problem.base.weight
    holder = nn.Sequential(OrderedDict(layer=base))
    layer = get_peft_model(holder, config, autocast_adapter_dtype=False).base_model.model.layer.eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        if parameter.requires_grad:  # variance 1 / fan-in: the update's output is of order one
            values = torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5
            parameter.data = values.to(problem.device, problem.dtype)
    return layer


def lora(problem: Problem) -> Candidate:
    layer = _peft_layer(problem, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["layer"]))
    leaves = {"A": [layer.lora_A["default"].weight], "B": [layer.lora_B["default"].weight]}
    scaling = layer.scaling["default"]

    def definition(x: Tensor, weight: Tensor, leaves: Leaves) -> Tensor:
        return F.linear(x, weight) + scaling * F.linear(F.linear(x, leaves["A"][0]), leaves["B"][0])

    return Candidate("lora", "torch", layer, leaves, definition, "lora")


class _LowRank(torch.autograd.Function):
    """``y = x W^T + scaling (x A^T) B^T``; each second product is added to the first in place."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        U = rows @ A.T
        ctx.save_for_backward(rows, weight, A, B, U)
        ctx.scaling = scaling
        y = (rows @ weight.T).addmm_(U, B.T, alpha=scaling)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, A, B, U = ctx.saved_tensors
        shape, grad = grad.shape[:-1], grad.reshape(-1, grad.shape[-1])
        dU = (grad @ B).mul_(ctx.scaling)
        grad_x = (grad @ weight).addmm_(dU, A).view(*shape, -1)
        return grad_x, None, dU.T @ rows, (grad.T @ U).mul_(ctx.scaling), None


def lora_by_hand(problem: Problem) -> Candidate:
    peft = lora(problem)
    (A,), (B,) = peft.leaves["A"], peft.leaves["B"]
    weight, scaling = problem.base.weight, ALPHA / RANK
    return replace(peft, name="addmm", forward=lambda x: _LowRank.apply(x, weight, A, B, scaling))


def lokr(problem: Problem) -> Candidate:
    layer = _peft_layer(problem, LoKrConfig(r=RANK, alpha=ALPHA, target_modules=["layer"]))
    factors = {"w1": layer.lokr_w1, "w2": layer.lokr_w2, "w2_a": layer.lokr_w2_a, "w2_b": layer.lokr_w2_b}
    leaves = {name: [table["default"]] for name, table in factors.items() if "default" in table}
    scaling = layer.scaling["default"]

    def definition(x: Tensor, weight: Tensor, leaves: Leaves) -> Tensor:
        second = leaves["w2"][0] if "w2" in leaves else leaves["w2_a"][0] @ leaves["w2_b"][0]
        return F.linear(x, weight) + F.linear(x, scaling * torch.kron(leaves["w1"][0], second))

    return Candidate("lokr", "torch", layer, leaves, definition, "lokr")


# --- the pyramid ------------------------------------------------------------------------------------------------------


def _ept(
    problem: Problem, name: str, backend: str, forward: Callable[[Tensor], Tensor], forced: str | None = None
) -> Candidate:
    layer, tasks = problem.layer, range(problem.point.tasks)
    with torch.no_grad():
        index, gates = layer.route(torch.tensor(list(tasks), device=problem.device))
        dense = gates.new_zeros(len(tasks), layer.geometry.num_experts).scatter(1, index, gates)
    samples = [problem.samples_of(task) for task in tasks]
    back = torch.cat(samples).argsort()

    def definition(x: Tensor, weight: Tensor, leaves: Leaves) -> Tensor:
        (A,), (B,), kernels = leaves["A"], leaves["B"], leaves["kernels"]
        folded = reference.fold_kernels(kernels, dense.to(A.dtype), layer.scaling, layer.geometry)

        def of_task(rows: Tensor, A: Tensor, B: Tensor, folded: Tensor) -> Tensor:
            return F.linear(rows, reference.pyramid_weight(A, B, folded, layer.geometry)[0].to(rows.dtype))

        # Recomputed in backward, so that one task's update is in memory at a time: 64 of 4096 x 4096 take 9 GB in fp64.
        parts = [
            checkpoint(of_task, x[samples[t]], A, B, folded[t : t + 1], use_reentrant=False, preserve_rng_state=False)
            for t in tasks
        ]
        return F.linear(x, weight) + torch.cat(parts)[back]

    leaves = {"A": [layer.A], "B": [layer.B], "kernels": list(layer.kernels)}
    router = [layer.gate, layer.task_table.weight]
    return Candidate(name, backend, forward, leaves, definition, "ept", forced, router)


def ept_linear(problem: Problem, backend: str) -> Candidate:
    """``EPTLinear`` on one backend, or on ``triton:PLAN``."""
    task_ids, name = problem.task_ids, backend.partition(":")[0]
    return _ept(problem, f"ept:{backend}", name, lambda x: problem.layer(x, task_ids), forced=backend)


def expert_loop(problem: Problem) -> Candidate:
    layer, geometry = problem.layer, problem.layer.geometry
    samples = [problem.samples_of(task) for task in range(problem.point.tasks)]
    back = torch.cat(samples).argsort()

    def one_expert(x: Tensor, expert: int) -> Tensor:
        scale = geometry.expert_scale[expert]
        k, width, height = geometry.scales[scale], geometry.widths[scale], geometry.heights[scale]
        seed = (layer.B[:height] @ layer.A[:, :width]).to(x.dtype)  # [h, w]
        rows = F.pad(x, (0, width * k - geometry.in_features)).view(-1, width, k)
        small = (rows.mT.reshape(-1, width) @ seed.T).view(-1, k, height)  # one product: broadcasting it is far slower
        kernel = layer.kernels[expert].to(x.dtype).T[:, None]  # [k, 1, k]
        large = F.conv_transpose1d(small, kernel, stride=k)[:, 0, : geometry.out_features]
        return geometry.alp_factors[scale] * large.view(*x.shape[:-1], -1)

    def forward(x: Tensor) -> Tensor:
        index, gates = layer.route(None if len(samples) == 1 else torch.arange(len(samples), device=x.device))
        parts = []
        for task, experts in enumerate(index.tolist()):
            rows = x[samples[task]]
            weighted = [one_expert(rows, e) * gates[task, place].to(x.dtype) for place, e in enumerate(experts)]
            parts.append(layer.scaling * sum(weighted))
        return F.linear(x, layer.weight) + torch.cat(parts)[back]

    return _ept(problem, "loop", "torch", forward)


def dense_update(problem: Problem) -> Candidate:
    layer = problem.layer
    tasks = range(problem.point.tasks)
    samples = [problem.samples_of(task) for task in tasks]
    back = torch.cat(samples).argsort()
    ids = torch.arange(len(tasks), device=problem.device)

    def forward(x: Tensor) -> Tensor:
        folded, *_ = layer.fold(ids if len(tasks) > 1 else 0)
        updates = pyramid_weight(layer.A, layer.B, folded, layer.geometry).to(x.dtype)
        if len(tasks) == 1:
            return F.linear(x, layer.weight + updates[0])
        return torch.cat([F.linear(x[samples[task]], layer.weight + updates[task]) for task in tasks])[back]

    return _ept(problem, "dense", automatic(problem.device, layer.A.dtype), forward)


def compiled(problem: Problem) -> Candidate:
    layer, geometry, task_ids = problem.layer, problem.layer.geometry, problem.task_ids

    def forward(x: Tensor) -> Tensor:
        folded, groups, _ = layer.fold(layer.tasks_for(x, task_ids))
        by_sample = folded if groups is None else folded[groups]
        y = F.linear(x, layer.weight)
        for scale, k in enumerate(geometry.scales):
            width, height, start = geometry.widths[scale], geometry.heights[scale], geometry.offsets[scale]
            A, B = layer.A[:, :width].to(x.dtype), layer.B[:height].to(x.dtype)
            core = by_sample[:, start : start + k * k].to(x.dtype).view(-1, 1, k, k)
            rows = F.pad(x, (0, width * k - geometry.in_features)).view(*x.shape[:-1], width, k)
            small = (A @ rows) @ core.mT  # [samples, length, r, k]
            y = y + (B @ small).flatten(-2)[..., : geometry.out_features]
        return y

    torch.compiler.reset()  # dynamo counts the points of a run as recompilations of one function, and gives up at eight
    return _ept(problem, "compile", "inductor", torch.compile(forward, fullgraph=True, dynamic=False))


BUILDERS: dict[str, Callable[[Problem], Candidate]] = {
    "linear": linear,
    "lora": lora,
    "addmm": lora_by_hand,
    "lokr": lokr,
    "loop": expert_loop,
    "dense": dense_update,
    "compile": compiled,
}
KINDS = (*BUILDERS, "ept")


def build_candidate(name: str, problem: Problem) -> Candidate:
    """The candidate of a name: a key of ``BUILDERS``, ``ept:BACKEND`` or ``ept:triton:PLAN``."""
    kind, _, backend = name.partition(":")
    return ept_linear(problem, backend) if kind == "ept" else BUILDERS[kind](problem)
