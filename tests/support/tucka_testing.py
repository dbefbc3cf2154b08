"""Random TuckA layers, evaluated by the package and by its reference: output and every gradient, by name."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import tucka_reference as reference
from pyramid_testing import Case, random_geometry
from torch import Tensor

from ept.baselines.tucka.adapter import TuckAConfig, TuckerAdapter
from ept.context import TaskContext, activate

LEARNED = ("x", "G", "U", "C", "centroids")


def tucker_adapter(
    in_features: int, out_features: int, config: TuckAConfig, dtype: torch.dtype = torch.float32
) -> TuckerAdapter:
    """An adapter whose own input decides the route."""
    shared = TuckerAdapter.make_shared(config, {"": (in_features, out_features)}, dtype=dtype)
    return TuckerAdapter(in_features, out_features, config, shared, dtype=dtype)


@dataclass(frozen=True)
class TuckAProblem:
    """A router and one adapted linear behind it, x ``[batch, sequence, in]`` of any memory layout, a mask or none."""

    case: Case
    num_groups: int = 3
    group_size: int = 2
    core_rank: int = 2
    alpha: float = 2.0
    masked: bool = False

    def tensors(self, dtype: torch.dtype, adapter_dtype: torch.dtype) -> dict[str, Tensor | None]:
        """Frozen and learned tensors, none of them at its initial value, and the cotangent of the output."""
        problem = self.case.tensors(dtype)
        g, generator = self.case.geometry, torch.Generator().manual_seed(self.case.seed + 1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(adapter_dtype)

        mask = None
        if self.masked:
            mask = torch.rand(self.case.lead, generator=generator) < 0.7
            mask[:, :1] = True
        return {
            "x": problem.x,
            "weight": problem.weight,
            "bias": problem.bias,
            "mask": mask,
            "cotangent": problem.cotangent,
            "G": normal(self.num_groups, self.core_rank, g.rank, g.rank),
            "U": normal(g.in_features, g.rank),
            "C": normal(self.group_size, self.core_rank),
            "centroids": normal(self.num_groups * self.group_size, g.in_features),
        }

    def ours(
        self, dtype: torch.dtype, adapter_dtype: torch.dtype | None = None, *, whole: bool = True
    ) -> dict[str, Tensor]:
        """By the package; without ``whole`` the base product is the caller's and the adapter changes its input."""
        adapter_dtype = adapter_dtype or dtype
        tensors, g = self.tensors(dtype, adapter_dtype), self.case.geometry
        config = TuckAConfig(
            r=g.rank,
            lora_alpha=self.alpha,
            num_groups=self.num_groups,
            group_size=self.group_size,
            core_rank=self.core_rank,
        )
        adapter = tucker_adapter(g.in_features, g.out_features, config, dtype=adapter_dtype)
        router = adapter.shared.router
        router.load_state_dict({"centroids": tensors["centroids"], "initialised": torch.tensor(True)})
        adapter.load_state_dict({name: tensors[name] for name in ("G", "U", "C")})
        x = tensors["x"].detach().requires_grad_()
        with activate(TaskContext(None, tensors["mask"])):
            if whole:
                output = adapter.linear(x, tensors["weight"], tensors["bias"])
            else:
                output = adapter.around(lambda rows: F.linear(rows, tensors["weight"], tensors["bias"]), x)
        leaves = {"x": x, "G": adapter.G, "U": adapter.U, "C": adapter.C, "centroids": router.centroids}
        return self._results(output, leaves, tensors["cotangent"])

    def reference(
        self, dtype: torch.dtype, adapter_dtype: torch.dtype | None = None, *, compute: torch.dtype = torch.float64
    ) -> dict[str, Tensor]:
        """By the definition, in ``compute``, on the values that ``ours`` gets."""
        tensors = self.tensors(dtype, adapter_dtype or dtype)
        wide = {name: None if t is None or name == "mask" else t.to(compute) for name, t in tensors.items()}
        leaves = {name: wide[name].detach().requires_grad_() for name in LEARNED}
        group, weights = reference.route(leaves["centroids"], leaves["x"], self.num_groups, tensors["mask"])
        factors = (leaves[name] for name in ("G", "U", "C"))
        output = reference.linear(leaves["x"], wide["weight"], wide["bias"], *factors, group, weights, self.alpha)
        return self._results(output, leaves, wide["cotangent"])

    @staticmethod
    def _results(output: Tensor, leaves: dict[str, Tensor], cotangent: Tensor) -> dict[str, Tensor]:
        gradients = torch.autograd.grad(output, list(leaves.values()), cotangent.to(output.dtype))
        return {"output": output.detach(), **dict(zip(leaves, gradients, strict=True))}


def random_problem(rng: random.Random, largest: int = 40) -> TuckAProblem:
    """Any layer, number of groups, experts and slices, batch and layout.

    Ranks from 2 on: one number divided by its norm is a constant, whose gradient is nothing but rounding.
    """
    geometry = random_geometry(rng, largest=largest, largest_scale=1, ranks=(2, 3, 5, 8))
    case = Case(
        geometry=geometry,
        lead=(rng.choice((1, 2, 3, 5)), rng.choice((1, 2, 5, 7))),
        layout=rng.choice(("contiguous", "transposed", "sliced", "strided")),
        bias=rng.random() < 0.5,
        seed=rng.randrange(1000),
    )
    return TuckAProblem(
        case,
        num_groups=rng.choice((1, 2, 3, 5)),
        group_size=rng.choice((2, 3, 4)),
        core_rank=rng.choice((1, 2, 3)),
        alpha=rng.choice((0.5, 2.0, 16.0)),
        masked=rng.random() < 0.5,
    )
