"""A pyramid for every layer, from gradients: where a parameter of which pyramid helps most (docs/pyramids.md)."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ept_kernels import PyramidGeometry
from ept_kernels.geometry import check_kernel_sizes

from .config import EPTConfig, Sizes, shared_and_pattern
from .tasks import TaskNames
from .tuner.quantised import has_dense_weight
from .tuner.targets import target_features

#: The pyramids that are weighed up: as many experts each, seeds of 2, 1, 1/2 and 1/4 of the default's size.
PYRAMIDS: tuple[Sizes, ...] = ((1, 1, 2, 2, 4, 4, 8, 8), (2, 2, 4, 4, 6, 6, 8, 8), (4, 4, 4, 4, 8, 8, 8, 8), (8,) * 8)

_ROUNDS = 3  # of alternating between the seed and the kernel that fit a gradient best

#: ``halves[task][0 or 1][layer]``: gradient ``[out, in]``, summed over every other batch.
_Gradients = dict[int, tuple[dict[str, Tensor], dict[str, Tensor]]]


@dataclass(frozen=True)
class SuggestedPyramid:
    """What ``suggest_pyramid`` proposes.

    Attributes:
        kernel_sizes, kernel_pattern: for ``EPTConfig``.
        parameters, budget: numbers in seeds and kernels of the proposal, and allowed.
        gains: layer -> pyramid -> the part of a step along the gradient, over all layers, that an expert of the pyramid
            makes there; the mean over its experts and the tasks, measured on other batches than it was fitted to.
    """

    kernel_sizes: Sizes
    kernel_pattern: dict[str, Sizes] | None
    parameters: int
    budget: int
    gains: dict[str, dict[Sizes, float]]


def suggest_pyramid(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    config: EPTConfig,
    *,
    budget: int | None = None,
    pyramids: Sequence[Sequence[int]] = PYRAMIDS,
) -> SuggestedPyramid:
    """Choose a pyramid for each layer that ``config`` targets, so that all together fit the budget.

    For every layer, task and scale k, the best seed ``Z`` of rank r and kernel ``K`` with ``<G, Z kron K>`` largest are
    found for the gradient G of one half of the batches; what they catch of the other half's gradient is their gain, so
    that noise earns nothing. Parameters then go where they gain most, one step up the list of pyramids at a time. A
    head should have been trained for some steps before: behind a random one all gradients are the head's noise.

    Args:
        model: the base model, without adapter; its output has a ``loss``. It is left as it was; two copies of the
            targeted weights are held for each task.
        batches: keyword arguments of the model, with at least two batches for each task. ``task_ids`` in them, ids or
            names of ``config``, tell the tasks apart; a model that does not take ``task_ids`` is called without.
        config: rank, targets and ``alp_scaling``; its own ``kernel_sizes`` (and pattern) give the default budget.
        budget: numbers in the seeds and kernels of all layers (gates, of one row per expert, come on top).
        pyramids: kernel sizes to choose from.

    Raises:
        ValueError: a model that has an adapter, task ids that ``config`` does not know, a budget below the cheapest
            choice, no pyramid that fits a layer, too few batches for a task, or a targeted weight that is not a dense
            float; TypeError: a model without a loss.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("model must be the base model alone, got one with an adapter; unload() gives the base back")
    choices = [check_kernel_sizes(sizes) for sizes in pyramids]
    features = target_features(model, config)
    costs = {name: _costs(name, *size, choices, config) for name, size in features.items()}
    if budget is None:
        budget = sum(
            _geometry(*size, config.for_layer(name).kernel_sizes, config).num_parameters
            for name, size in features.items()
        )
    least = sum(min(own.values()) for own in costs.values())
    if budget < least:
        raise ValueError(f"budget must be at least {least:,} (the cheapest pyramid in every layer), got {budget:,}")
    gradients = _collect(model, batches, list(features), TaskNames(config.num_tasks, config.task_names))
    gains = _gains(gradients, costs, config.r)
    chosen, spent = _spend(budget, costs, gains)
    return SuggestedPyramid(*shared_and_pattern(chosen), spent, budget, gains)


def _geometry(in_features: int, out_features: int, sizes: Sizes, config: EPTConfig) -> PyramidGeometry:
    return PyramidGeometry(in_features, out_features, config.r, sizes, config.alp_scaling)


def _costs(
    name: str, in_features: int, out_features: int, choices: Sequence[Sizes], config: EPTConfig
) -> dict[Sizes, int]:
    fitting = [sizes for sizes in choices if max(sizes) <= min(in_features, out_features)]
    if not fitting:
        raise ValueError(f"pyramids: none of {list(choices)} fits the layer {name!r} [{out_features}, {in_features}]")
    return {sizes: _geometry(in_features, out_features, sizes, config).num_parameters for sizes in fitting}


# ---- gradients


def _collect(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], names: Sequence[str], tasks: TaskNames
) -> _Gradients:
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    for name, layer in layers.items():
        if not (isinstance(layer, (nn.Linear, Conv1D)) and has_dense_weight(layer)):
            raise ValueError(f"model: {name!r} is no linear layer with a dense float weight: it has no gradient")
    takes_tasks = "task_ids" in inspect.signature(model.forward).parameters
    halves: _Gradients = {}
    seen: dict[int, int] = {}
    with _only_trainable(model, [layer.weight for layer in layers.values()]):
        for batch in batches:
            for task, part in _by_task(batch, tasks):
                output = model(**{key: value for key, value in part.items() if takes_tasks or key != "task_ids"})
                loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
                if loss is None:
                    raise TypeError("model gave no loss: batches must hold labels")
                found = torch.autograd.grad(loss, [layer.weight for layer in layers.values()])
                half = halves.setdefault(task, ({}, {}))[seen.get(task, 0) % 2]
                seen[task] = seen.get(task, 0) + 1
                for (name, layer), gradient in zip(layers.items(), found, strict=True):
                    gradient = gradient.T if isinstance(layer, Conv1D) else gradient
                    half[name] = half[name] + gradient if name in half else gradient.float()
    short = sorted(task for task, count in seen.items() if count < 2)
    if short or not seen:
        raise ValueError(f"batches must hold each task at least twice; once only: {short or 'none at all'}")
    return halves


@contextmanager
def _only_trainable(model: nn.Module, weights: Sequence[nn.Parameter]):
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)


def _by_task(batch: Mapping[str, Any], tasks: TaskNames) -> Iterable[tuple[int, Mapping[str, Any]]]:
    """The rows of each task, as a batch of their own."""
    ids: Any = tasks.resolve(batch.get("task_ids"))  # a mixture is no label, and int() refuses it
    if not isinstance(ids, Tensor) or not ids.dim():
        yield int(ids), {**batch, "task_ids": ids}
        return
    for task in ids.unique().tolist():
        rows = ids == task
        yield (
            task,
            {
                key: value[rows] if isinstance(value, Tensor) and value.shape[:1] == ids.shape else value
                for key, value in {**batch, "task_ids": ids}.items()
            },
        )


# ---- gains


def _gains(gradients: _Gradients, costs: Mapping[str, Mapping[Sizes, int]], rank: int) -> dict[str, dict[Sizes, float]]:
    lengths = {
        task: [sum(g.square().sum().item() for g in half.values()) ** 0.5 for half in halves]
        for task, halves in gradients.items()
    }
    gains = {}
    for name, own in costs.items():
        by_scale = {}
        for scale in sorted({size for sizes in own for size in sizes}):
            caught = 0.0
            for task, halves in gradients.items():
                for fitted, other in ((0, 1), (1, 0)):
                    length = max(lengths[task][other], torch.finfo(torch.float32).tiny)
                    caught += _caught(halves[fitted][name], halves[other][name], scale, rank) / length
            by_scale[scale] = caught / (2 * len(gradients))
        gains[name] = {sizes: sum(by_scale[size] for size in sizes) / len(sizes) for sizes in own}
    return gains


def _caught(fitted: Tensor, other: Tensor, scale: int, rank: int) -> float:
    """``<other, Z kron K>`` for the unit ``Z`` of this rank and unit ``K`` that fit ``fitted`` best."""
    rows, columns = (-(-size // scale) for size in fitted.shape)
    blocks = _blocks(fitted, scale)
    kernel = torch.linalg.eigh(blocks.T @ blocks).eigenvectors[:, -1]
    for _ in range(_ROUNDS if scale > 1 else 1):
        seed = _truncated((blocks @ kernel).view(rows, columns), rank).flatten()
        seed = F.normalize(seed, dim=0)
        kernel = F.normalize(blocks.T @ seed, dim=0)
    return (seed @ (_blocks(other, scale) @ kernel)).item()


def _blocks(matrix: Tensor, scale: int) -> Tensor:
    """``[out, in]`` -> ``[ceil(out/k) * ceil(in/k), k * k]``: one row per block, in which ``Z kron K`` is ``Z K^T``."""
    height, width = matrix.shape
    padded = F.pad(matrix, (0, -width % scale, 0, -height % scale))
    return padded.unflatten(0, (-1, scale)).unflatten(2, (-1, scale)).transpose(1, 2).flatten(2).flatten(0, 1)


def _truncated(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation of this rank, from a few random directions; the same every time."""
    width = min(rank + 4, *matrix.shape)
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(0)
        left, values, right = torch.svd_lowrank(matrix, q=width, niter=2)
    return (left[:, :rank] * values[:rank]) @ right[:, :rank].T


# ---- budget


def _spend(
    budget: int, costs: Mapping[str, Mapping[Sizes, int]], gains: Mapping[str, Mapping[Sizes, float]]
) -> tuple[dict[str, Sizes], int]:
    """Start with the cheapest everywhere; then, as long as one fits, take the change with the most gain a number."""
    chosen = {name: min(own, key=own.__getitem__) for name, own in costs.items()}
    spent = sum(costs[name][sizes] for name, sizes in chosen.items())
    while True:
        best = None
        for name, now in chosen.items():
            for sizes, cost in costs[name].items():
                more, gained = cost - costs[name][now], gains[name][sizes] - gains[name][now]
                if more > 0 and gained > 0 and spent + more <= budget and (best is None or gained / more > best[0]):
                    best = (gained / more, name, sizes, more)
        if best is None:
            return chosen, spent
        chosen[best[1]] = best[2]
        spent += best[3]
