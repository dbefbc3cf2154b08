"""Layers and experts of a saved adapter: which task uses which expert, with what weight, and what ranks they add."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ept_kernels import PyramidGeometry, fold_kernels

from ..baselines.moelora import MOELoRAConfig
from ..baselines.more import MoREConfig
from ..config import AdapterConfig, EPTConfig
from ..export.lora import pyramid_factors
from ..layer_adapter import LayerAdapter
from ..methods import method_of
from ..pyramid.router import route, route_stages
from ..saved import AdapterError, SavedAdapter


@dataclass(frozen=True)
class Ranks:
    """Of a matrix with the singular values s, largest first.

    Attributes:
        rank: values above ``tolerance * s[0]``.
        stable: ``sum s^2 / s[0]^2``, from 1 to the rank; 0 for a zero matrix.
        entropy: ``exp(-sum p log p)`` with ``p = s / sum s``, from 1 to the rank (Roy and Vetterli's effective rank); 0
            for a zero matrix.
        norm: Frobenius norm.
    """

    rank: int
    stable: float
    entropy: float
    norm: float


def tolerance(rows: int, columns: int, dtype: torch.dtype) -> float:
    """Share of the largest singular value below which one counts as zero: ``max(rows, columns) * eps`` of ``dtype``."""
    return max(rows, columns) * torch.finfo(dtype).eps


def ranks_of(matrix: Tensor, relative_tolerance: float) -> Ranks:
    """The ranks of ``matrix [m, n]``, computed in float64.

    Args:
        relative_tolerance: see ``tolerance``; that of the dtype in which the matrix was trained and stored.
    """
    values = torch.linalg.svdvals(matrix.double())
    largest = values.max().item() if values.numel() else 0.0
    if largest == 0.0:
        return Ranks(0, 0.0, 0.0, 0.0)
    shares = values / values.sum()
    entropy = -torch.special.xlogy(shares, shares).sum()
    return Ranks(
        rank=int((values > relative_tolerance * largest).sum()),
        stable=(values.square().sum() / largest**2).item(),
        entropy=entropy.exp().item(),
        norm=values.square().sum().sqrt().item(),
    )


def update_core(A: Tensor, B: Tensor, folded: Tensor, geometry: PyramidGeometry) -> Tensor:
    """A small matrix with the singular values of one task's update ``sum_k (B_k A_k) kron Kbar_k``.

    The update is a product of two thin factors (``pyramid_factors``), so that its singular values are those of the
    product of their triangular factors: no ``[out, in]`` matrix is made.

    Args:
        A: ``[r, seed_width]``. B: ``[seed_height, r]``. folded: ``[folded_size]``, as ``ept_kernels.fold_kernels``.

    Returns:
        ``[n, n]`` in float64 with n at most ``r * sum`` of the scales in use; ``[1, 1]`` zeros where none is.
    """
    lora_A, lora_B = pyramid_factors(A.double(), B.double(), folded.double(), [True] * len(geometry.scales), geometry)
    if len(lora_A) == 0:
        return torch.zeros(1, 1, dtype=torch.float64)
    first = torch.linalg.qr(lora_B, mode="r").R
    second = torch.linalg.qr(lora_A.T, mode="r").R
    return first @ second.T


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


Gates = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Expert:
    """One expert of an EPT layer.

    Attributes:
        kernel_rank: numerical rank of its kernel K. effective_rank: ``r * kernel_rank``, the rank of its update.
        entropy: how many directions K uses evenly (``ranks.Ranks.entropy``). norm: Frobenius norm of K.
        tasks: names of the tasks that use it.
    """

    kernel_size: int
    kernel_rank: int
    effective_rank: int
    entropy: float
    norm: float
    tasks: tuple[str, ...]


def expert_views(pyramid: SavedPyramid, gates: Gates, tasks: Sequence[str]) -> tuple[Expert, ...]:
    """Every expert of a layer; ``gates``: ``[task][expert]``, or empty where gates are not a task's."""
    views = []
    for place, kernel in enumerate(pyramid.kernels):
        size = len(kernel)
        ranks = ranks_of(kernel, tolerance(size, size, kernel.dtype))
        users = tuple(task for task, weights in zip(tasks, gates, strict=False) if weights[place] > 0)
        effective = pyramid.geometry.rank * ranks.rank
        views.append(Expert(size, ranks.rank, effective, ranks.entropy, ranks.norm, users))
    return tuple(views)


def expert_labels(saved: SavedAdapter, layer: str) -> tuple[int, ...]:
    """What each expert of a layer is: its kernel size, rank or number; empty without experts for tasks."""
    config = saved.config
    if isinstance(config, EPTConfig):
        return config.for_layer(layer).all_kernel_sizes
    if isinstance(config, MoREConfig):
        return tuple(range(1, config.for_layer(layer).r + 1))
    return tuple(range(1, config.num_experts + 1)) if isinstance(config, MOELoRAConfig) else ()


def expert_kind(saved: SavedAdapter) -> str:
    """What ``expert_labels`` are, in words."""
    config = saved.config
    return (method_of(config).adapter if isinstance(config, AdapterConfig) else LayerAdapter).expert_kind


def task_gates(saved: SavedAdapter) -> tuple[dict[str, Gates], tuple[str, ...]]:
    """Layer -> weight ``[task][expert]``, 0 where the task does not use the expert; and notes where there is none.

    Raises:
        AdapterError: a gate or task table that does not fit the config.
    """
    config = saved.config
    if getattr(config, "routing", "task") == "token":
        return {}, ("Experts are chosen by every token, not by task: no gates, no dead experts, no update of a task.",)
    try:
        if isinstance(config, (EPTConfig, MoREConfig)):
            return {name: _routed(saved, name) for name in saved.layers}, ()
        if isinstance(config, MOELoRAConfig):
            weights = (saved.shared["embedding"][: config.num_tasks] @ saved.shared["gate"].T).softmax(-1)
            return dict.fromkeys(saved.layers, _tuples(weights)), ()
    except (KeyError, RuntimeError) as error:
        raise AdapterError(f"{str(saved.folder)!r}: gates do not fit the config: {error}") from error
    return {}, (f"{saved.method} does not give experts to tasks: no gates, no dead experts.",)


def _routed(saved: SavedAdapter, name: str) -> Gates:
    gate = saved.layers[name]["gate"]
    embeddings = saved.shared["weight"]
    if len(embeddings) != saved.config.num_tasks:
        raise AdapterError(
            f"{str(saved.folder)!r}: {len(embeddings)} task embeddings for {saved.config.num_tasks} tasks of the config"
        )
    if isinstance(saved.config, EPTConfig):
        stages = saved.config.for_layer(name).stages
        index, weights = route_stages(gate, embeddings, torch.arange(len(embeddings)), saved.config.top_k, stages)
    else:
        index, weights = route(gate, embeddings, 1)
    weights = weights.clamp_min(torch.finfo(weights.dtype).tiny)  # 0 would say that the expert is not chosen
    return _tuples(torch.zeros(len(embeddings), len(gate), dtype=weights.dtype).scatter(1, index, weights))


def _tuples(weights: Tensor) -> Gates:
    return tuple(map(tuple, weights.detach().double().tolist()))
