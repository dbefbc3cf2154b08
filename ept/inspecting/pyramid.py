"""One EPT layer out of its saved tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ept.config import EPTConfig
from ept.inspecting.folder import AdapterError, SavedAdapter
from ept.inspecting.ranks import Ranks, ranks_of, tolerance, update_core
from ept_kernels import PyramidGeometry, fold_kernels


@dataclass(frozen=True)
class SavedPyramid:
    """Tensors of a layer as in ``ept.pyramid.adapter.PyramidAdapter``.

    ``geometry`` has the largest sizes that fit the tensors: they hold ``ceil(size / k_min)``, not the size.
    """

    geometry: PyramidGeometry
    scaling: float
    A: Tensor
    B: Tensor
    gate: Tensor
    kernels: tuple[Tensor, ...]

    def update_ranks(self, weights: Sequence[float]) -> Ranks:
        """Ranks of a task's update, from its weight for every expert ``[E]``."""
        gates = torch.tensor([weights], dtype=torch.float64)
        kernels = [kernel.double() for kernel in self.kernels]
        folded = fold_kernels(kernels, gates, self.scaling, self.geometry)[0]
        core = update_core(self.A, self.B, folded, self.geometry)
        larger = max(self.geometry.in_features, self.geometry.out_features)
        return ranks_of(core, tolerance(larger, 1, self.A.dtype))


def saved_pyramid(saved: SavedAdapter, name: str) -> SavedPyramid:
    """The layer ``name`` of an EPT adapter.

    Raises:
        AdapterError: its tensors are not those that the config calls for.
    """
    tensors = saved.layers[name]
    config = saved.config.for_layer(name)
    assert isinstance(config, EPTConfig)
    sizes = config.all_kernel_sizes
    smallest = min(sizes)
    where = f"{str(saved.folder)!r}, layer {name!r}"
    expected = {"A", "B", "gate", *(f"kernels.{place}" for place in range(len(sizes)))}
    if set(tensors) != expected:
        difference = ", ".join(sorted(set(tensors) ^ expected))
        raise AdapterError(f"{where}: the pyramid {sizes} of the config does not fit the tensors; look at {difference}")
    A, B, gate = (tensors[part] for part in ("A", "B", "gate"))
    kernels = tuple(tensors[f"kernels.{place}"] for place in range(len(sizes)))
    found = {"A": A.shape[:1], "B": B.shape[1:], "gate": gate.shape[:1]}
    for place, kernel in enumerate(kernels):
        found[f"kernels.{place}"] = kernel.shape
    wanted = {"A": [config.r], "B": [config.r], "gate": [len(sizes)]}
    wanted |= {f"kernels.{place}": [k, k] for place, k in enumerate(sizes)}
    for part, shape in found.items():
        if list(shape) != wanted[part] or tensors[part].dim() != 2:
            raise AdapterError(f"{where}: {part} is {list(tensors[part].shape)}, which does not fit the config")
    try:
        geometry = PyramidGeometry(
            A.shape[1] * smallest, B.shape[0] * smallest, config.r, sizes, alp_scaling=config.alp_scaling
        )
    except ValueError as error:
        raise AdapterError(f"{where}: {error}") from None
    return SavedPyramid(geometry, config.lora_alpha / config.r, A, B, gate, kernels)
