"""What the kernel and the layer tests share: an independent formulation, random problems, a recorder of tensor ops."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ept_kernels import PyramidGeometry, problem, reference

BACKENDS = ("torch", "reference", "cpu")
#: Backends that compute in fp32 at best.
SINGLE_PRECISION = ("cpu",)

#: The inputs of each public function that can have a gradient, in the order of its arguments.
DIFFERENTIABLE = {
    "pyramid_weight": ("A", "B", "folded"),
    "pyramid_delta": ("x", "A", "B", "folded"),
    "pyramid_linear": ("x", "weight", "bias", "A", "B", "folded"),
}
LAYOUTS = ("contiguous", "transposed", "sliced", "strided", "expanded")
GROUPINGS = ("none", "one", "sample", "row")
#: How many rows each group gets: any, all the same one, as many groups as there are, a few popular ones, one huge
#: group among single rows; the last two in runs of consecutive rows, too.
SKEWS = ("uniform", "identical", "distinct", "zipf", "huge", "zipf runs", "huge runs")


def examples(count: int) -> settings:
    """Hypothesis settings: the same examples on every run, never a deadline."""
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def working_dtype() -> torch.dtype:
    """The widest dtype of the backend under test: float64 where it has that."""
    return torch.float32 if os.environ.get("EPT_BACKEND") in SINGLE_PRECISION else torch.float64


def tight() -> float:
    """The relative error that is allowed in ``working_dtype()``."""
    return 1e-12 if working_dtype() == torch.float64 else 1e-5


# --- an independent formulation, straight from section 1 of the specification -----------------------------------------


def kron_weight(A: Tensor, B: Tensor, kernel: Tensor, out_features: int, in_features: int) -> Tensor:
    """``crop((B_k A_k) kron K)``: one expert's dense update, without the ALP factor."""
    k = kernel.shape[0]
    height, width = -(-out_features // k), -(-in_features // k)
    return torch.kron((B[:height, :] @ A[:, :width]).contiguous(), kernel.contiguous())[:out_features, :in_features]


def alp_factor(out_features: int, k: int, k_min: int) -> float:
    """``h_k / h``, the share of the seed's rows that scale k uses."""
    return -(-out_features // k) / -(-out_features // k_min)


# --- random problems --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Sizes of one call of an op; the tensors follow from the seed."""

    geometry: PyramidGeometry
    lead: tuple[int, ...] = (3,)
    grouping: str = "none"
    num_groups: int = 1
    layout: str = "contiguous"
    bias: bool = True
    zero_scale: bool = False  # the last scale is switched off
    seed: int = 0
    skew: str = "uniform"
    zero_groups: tuple[int, ...] = ()  # groups in which the first scale is switched off

    def tensors(self, dtype: torch.dtype | None = None, adapter_dtype: torch.dtype | None = None) -> Problem:
        """The tensors of this case in ``dtype`` (default: ``working_dtype()``); A, B, folded in ``adapter_dtype``."""
        dtype = dtype or working_dtype()
        generator = torch.Generator().manual_seed(self.seed)
        g, adapter = self.geometry, adapter_dtype or dtype

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return std * torch.randn(shape, generator=generator, dtype=torch.float64)

        folded = normal(self.num_groups, g.folded_size, std=0.5)
        if self.zero_scale:
            start, k = g.offsets[-1], g.scales[-1]
            folded[:, start : start + k * k] = 0
        folded[list(self.zero_groups), : g.scales[0] ** 2] = 0
        return Problem(
            geometry=g,
            x=_laid_out(self.layout, self.lead, g.in_features, dtype, normal),
            weight=normal(g.out_features, g.in_features).to(dtype),
            bias=normal(g.out_features).to(dtype) if self.bias else None,
            A=normal(g.rank, g.seed_width).to(adapter),
            B=normal(g.seed_height, g.rank).to(adapter),
            folded=folded.to(adapter),
            groups=self._groups(generator),
            cotangent=_laid_out(self.layout, self.lead, g.out_features, dtype, normal),
            weight_cotangent=normal(self.num_groups, g.out_features, g.in_features).to(adapter),
        )

    def _groups(self, generator: torch.Generator) -> Tensor | None:
        rows = torch.Size(self.lead).numel()
        counts = {"one": 1, "sample": self.lead[0] if self.lead else 1, "row": rows}
        if self.grouping == "none":
            return None
        return skewed_groups(self.skew, counts[self.grouping], self.num_groups, generator)


def skewed_groups(skew: str, count: int, num_groups: int, generator: torch.Generator) -> Tensor:
    """``count`` group ids below ``num_groups``, distributed as ``SKEWS`` says."""
    kind, _, order = skew.partition(" ")
    if kind == "identical":
        return torch.randint(num_groups, (1,), generator=generator).repeat(count)
    if kind == "distinct":
        return torch.arange(count) % num_groups
    if kind == "zipf":
        popularity = 1 / torch.arange(1, num_groups + 1)
        groups = torch.multinomial(popularity, max(count, 1), replacement=True, generator=generator)[:count]
    elif kind == "huge":
        groups = torch.randint(num_groups, (count,), generator=generator)
        groups[torch.rand(count, generator=generator) < 0.8] = 0
    else:
        return torch.randint(num_groups, (count,), generator=generator)
    return groups.sort().values if order else groups


@dataclass(frozen=True)
class Problem:
    """Arguments of the public functions, and cotangents of their results."""

    geometry: PyramidGeometry
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    folded: Tensor
    groups: Tensor | None
    cotangent: Tensor
    weight_cotangent: Tensor
    active: Tensor | None = None  # of the fast functions; the reference computes everything

    def arguments(self, op: str) -> dict[str, Tensor]:
        """The differentiable arguments of ``op`` that are present."""
        named = {name: getattr(self, name) for name in DIFFERENTIABLE[op]}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def for_backends(self) -> problem.Problem:
        """This problem as a backend takes it: rows, sizes."""
        g = self.geometry
        rows = self.x.reshape(-1, g.in_features)
        return problem.Problem(rows, self.A, self.B, self.folded, self.groups, self.active, g.out_features, g.scales)

    def call(self, module: ModuleType, op: str, **replaced: Tensor) -> Tensor:
        """``module.<op>`` on this problem, with some arguments replaced."""
        positional = [replaced.get(name, getattr(self, name)) for name in DIFFERENTIABLE[op]]
        options = {}
        if op != "pyramid_weight":
            positional.append(self.groups)
            if self.active is not None and module is not reference:
                options["active"] = self.active
        return getattr(module, op)(*positional, self.geometry, **options)

    def cotangent_of(self, op: str) -> Tensor:
        return self.weight_cotangent if op == "pyramid_weight" else self.cotangent

    def evaluate(
        self, module: ModuleType, op: str, dtype: torch.dtype | None = None, wanted: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """The output of ``op`` and the gradient of each wanted argument (default: all), by name.

        ``dtype`` casts every tensor first. Strides are kept otherwise: a leaf is a detached view.
        """
        wanted = list(self.arguments(op)) if wanted is None else wanted
        leaves = {
            name: (tensor if dtype is None else tensor.to(dtype)).detach().requires_grad_(name in wanted)
            for name, tensor in self.arguments(op).items()
        }
        output = self.call(module, op, **leaves)
        gradients = torch.autograd.grad(
            output, [leaves[name] for name in wanted], self.cotangent_of(op).to(output.dtype)
        )
        return {"output": output.detach(), **dict(zip(wanted, gradients, strict=True))}


def folded_entries(table: Tensor, geometry: PyramidGeometry) -> Tensor:
    """A table ``[G, S]`` for every entry of the folded kernels, ``[G, folded_size]``."""
    return table.repeat_interleave(torch.tensor([k * k for k in geometry.scales], device=table.device), dim=1)


def partly_active(case: Case, dtype: torch.dtype | None = None, adapter_dtype: torch.dtype | None = None) -> Problem:
    """Some scales of some groups inactive, and some active with a kernel that is (still) zero."""
    problem = case.tensors(dtype, adapter_dtype)
    generator = torch.Generator().manual_seed(case.seed + 1)
    shape = (case.num_groups, len(case.geometry.scales))
    active, zero = (torch.rand(shape, generator=generator) < share for share in (0.6, 0.3))
    folded = problem.folded.masked_fill(~folded_entries(active & ~zero, case.geometry), 0)
    return replace(problem, folded=folded, active=active)


def expected_where_active(problem: Problem, op: str) -> dict[str, Tensor]:
    """The reference's results in float64, the gradient of inactive kernels zero."""
    truth = problem.evaluate(reference, op, dtype=torch.float64)
    wanted = folded_entries(problem.active, problem.geometry)
    return truth | {"folded": truth["folded"].masked_fill(~wanted, 0)}


def _laid_out(layout: str, lead: tuple[int, ...], features: int, dtype: torch.dtype, normal) -> Tensor:
    if layout == "transposed":
        return normal(features, *lead).to(dtype).movedim(0, -1)
    if layout == "sliced":
        return normal(*lead, features + 3).to(dtype)[..., 2 : 2 + features]
    if layout == "strided":
        return normal(*lead, 2 * features).to(dtype)[..., ::2]
    if layout == "expanded":
        return normal(*([1] * len(lead)), features).to(dtype).expand(*lead, features)
    return normal(*lead, features).to(dtype)


def from_seed(build: Callable[[random.Random], Any]) -> st.SearchStrategy:
    """Examples made from a random seed each: Hypothesis' own draws favour the smallest layers, which hide the most."""
    return st.integers(0, 2**32 - 1).map(lambda seed: build(random.Random(seed)))


def random_geometry(
    rng: random.Random, largest: int = 40, largest_scale: int = 9, ranks: Sequence[int] = (1, 2, 3, 5, 8, 16)
) -> PyramidGeometry:
    """Any layer and pyramid: sizes that no scale divides, odd scales, k = 1, repeats in any order."""
    in_features, out_features = rng.randint(1, largest), rng.randint(1, largest)
    scales = range(1, min(in_features, out_features, largest_scale) + 1)
    common = rng.choice((1, 1, 2, 3))  # a divisor of all scales, where the layer has room for one
    scales = [k for k in scales if k % common == 0] or scales
    kernel_sizes = tuple(rng.choice(scales) for _ in range(rng.randint(1, 6)))
    rank = rng.choice(ranks)
    return PyramidGeometry(in_features, out_features, rank, kernel_sizes, rng.random() < 0.7)


def random_case(rng: random.Random) -> Case:
    """Any call of an op: leading shape (also empty), grouping, unused groups, memory layout."""
    batch, length = rng.choice((0, 1, 2, 3, 5, 7)), rng.choice((0, 1, 2, 5))
    grouping = rng.choice(GROUPINGS)
    case = Case(
        geometry=random_geometry(rng),
        lead=rng.choice(((), (batch,), (batch, length), (batch, length), (batch, length, 2))),
        grouping=grouping,
        num_groups=1 if grouping == "none" else rng.randint(1, 9),
        layout=rng.choice(LAYOUTS),
        bias=rng.random() < 0.5,
        zero_scale=rng.random() < 0.2,
        seed=rng.randrange(1000),
    )
    return replace(case, zero_groups=tuple(group for group in range(case.num_groups) if rng.random() < 0.3))


geometries = partial(from_seed, random_geometry)
cases = partial(from_seed, random_case)


# --- comparison -------------------------------------------------------------------------------------------------------


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of ``exact``, in float64; 0 where both are zero or empty."""
    difference = (actual.double() - exact.double()).norm().item()
    return difference / exact.double().norm().item() if difference else 0.0


def assert_matches(actual: Tensor, exact: Tensor, tolerance: float, what: str = "result") -> None:
    """Same shape, no NaN, relative error within the tolerance."""
    assert actual.shape == exact.shape, f"{what}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    if exact.norm() == 0:
        assert not actual.any(), f"{what}: expected zeros"
        return
    error = relative_error(actual, exact)
    assert error <= tolerance, f"{what}: relative error {error:.2e} > {tolerance:.0e}"


def assert_all_match(actual: dict[str, Tensor], exact: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == exact.keys()
    for name, tensor in actual.items():
        assert_matches(tensor, exact[name], tolerance, name)


def assert_twice_as_wrong_at_most(
    actual: dict[str, Tensor], problem: Problem, module: ModuleType, op: str, floor: float = 0.0
) -> None:
    """Errors at most twice those of the plain ``module.<op>`` in the same dtype, or ``floor``."""
    wanted = [name for name in actual if name != "output"]
    truth, plain = (problem.evaluate(module, op, dtype, wanted) for dtype in (torch.float64, None))
    for name, value in actual.items():
        error, allowed = relative_error(value, truth[name]), 2 * relative_error(plain[name], truth[name])
        assert error <= max(allowed, floor), f"{name}: error {error:.2e}, plain torch allows {allowed:.2e}"


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "tensor") -> None:
    """Equal in every bit, NaN and the sign of zero included."""
    assert actual.dtype == expected.dtype, what
    assert actual.shape == expected.shape, what
    as_bytes = [tensor.detach().contiguous().flatten().view(torch.uint8) for tensor in (actual, expected)]
    assert torch.equal(*as_bytes), f"{what} differs"


# --- what runs inside an op -------------------------------------------------------------------------------------------

#: Operations that read a value back to the host.
HOST_READS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "equal", "unique", "_unique2")


class Recorder(TorchDispatchMode):
    """Every ATen operation under way, those inside the ``ept`` ops too, with the tensors it takes and gives."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[Tensor]]] = []
        self.created: list[Tensor] = []  # allocated by an operation, rather than changed or viewed

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == "ept":  # step inside: a mode is off while the op that it intercepts runs
            with self:
                return function._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        result = function(*args, **kwargs)
        given, made = (
            [value for value in torch.utils._pytree.tree_flatten(part)[0] if isinstance(value, Tensor)]
            for part in ((args, kwargs), result)
        )
        self.calls.append((str(function).split(".")[1], given + made))
        known = {tensor.untyped_storage().data_ptr() for tensor in given}
        self.created += [each for each in made if each.numel() and each.untyped_storage().data_ptr() not in known]
        return result

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def large(self, threshold: int, besides: Sequence[Tensor] = ()) -> list[tuple[str, list[int]]]:
        """Operations that take or give a tensor of ``threshold`` elements or more, with the sizes of those.

        Views of the tensors ``besides`` do not count.
        """
        known = {tensor.untyped_storage().data_ptr() for tensor in besides}
        found = []
        for name, tensors in self.calls:
            large = [tensor for tensor in tensors if tensor.numel() >= threshold]
            sizes = [tensor.numel() for tensor in large if tensor.untyped_storage().data_ptr() not in known]
            if sizes:
                found.append((name, sizes))
        return found


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, ``torch.empty`` and its kin hold NaN, so that a forgotten element shows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = filled


# --- an independent EPTLinear -----------------------------------------------------------------------------------------


@torch.no_grad()
def shake(layer: torch.nn.Module, seed: int = 0, std: float = 0.5) -> torch.nn.Module:
    """Random values for every adapter parameter: a fresh layer's kernels are zero and would hide everything."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(layer.named_parameters()):
        if parameter.requires_grad:
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(values * (1.0 if "task" in name else std))
    return layer


def expected_gates(gate: Tensor, embedding: Tensor, top_k: int) -> list[tuple[int, Tensor]]:
    """Selected experts of one task with their weights, best first (specification, section 3)."""
    logits = [(gate[e] * embedding).sum() for e in range(len(gate))]
    best = sorted(range(len(logits)), key=lambda e: -logits[e].item())[:top_k]
    if top_k == 1:  # straight-through: value 1, gradient of the full softmax
        probability = torch.exp(logits[best[0]]) / sum(torch.exp(logit) for logit in logits)
        return [(best[0], 1 + probability - probability.detach())]
    total = sum(torch.exp(logits[e]) for e in best)
    return [(e, torch.exp(logits[e]) / total) for e in best]


def expected_delta_weight(
    parameters: dict[str, Tensor], config, task: int, out_features: int, in_features: int
) -> Tensor:
    """``(alpha / r) sum_{e in TopK(task)} g_e s_{k_e} crop((B_k A_k) kron K_e)``."""
    total = parameters["A"].new_zeros(out_features, in_features)
    k_min = min(config.kernel_sizes)
    embedding = parameters["task_embeddings.weight"][task]
    for expert, weight in expected_gates(parameters["gate"], embedding, config.top_k):
        k = config.kernel_sizes[expert]
        factor = alp_factor(out_features, k, k_min) if config.alp_scaling else 1.0
        update = kron_weight(
            parameters["A"], parameters["B"], parameters[f"kernels.{expert}"], out_features, in_features
        )
        total = total + weight * factor * update
    return config.lora_alpha / config.r * total


def expected_output(parameters: dict[str, Tensor], config, x: Tensor, tasks: Sequence[int]) -> Tensor:
    """An ``EPTLinear`` from its definition: one dense weight for each sample of x, ``tasks[i]`` its task."""
    weight, bias = parameters["weight"], parameters.get("bias")
    outputs = []
    for sample, task in zip(x, tasks, strict=True):
        update = expected_delta_weight(parameters, config, task, *weight.shape)
        outputs.append(sample @ (weight + update).T + (0 if bias is None else bias))
    return torch.stack(outputs) if outputs else x.new_zeros(*x.shape[:-1], weight.shape[0])
