"""What the processes of a launch found against what one process alone found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Result = dict[str, Any]


def _flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in tensors.values()])


def distance(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> float:
    """``||found - wanted|| / ||wanted - start||``: how far apart two ends of training are, in lengths of the way."""
    assert found.keys() == wanted.keys() == start.keys()
    way = (_flat(wanted) - _flat(start)).norm()
    assert way > 0, "nothing was trained"
    return float((_flat(found) - _flat(wanted)).norm() / way)


def loss_distance(found: Mapping[str, Sequence[float]], wanted: Mapping[str, Sequence[float]]) -> float:
    """The largest difference of a logged loss, over all steps and parts; logs are fp32."""
    assert found.keys() == wanted.keys() and wanted["loss"]
    pairs = [pair for name in wanted for pair in zip(found[name], wanted[name], strict=True)]
    return max(abs(a - b) for a, b in pairs)


def score_distance(found: Mapping[str, Mapping[str, float]], wanted: Mapping[str, Mapping[str, float]]) -> float:
    """The largest difference of a task's metric or evaluation loss."""
    assert found.keys() == wanted.keys()
    return max(abs(found[task][name] - value) for task in wanted for name, value in wanted[task].items())


def unequal(ranks: Sequence[Mapping[str, Tensor]]) -> list[str]:
    """Tensors that do not have the same bits on every rank."""
    return [name for name in ranks[0] if any(not torch.equal(other[name], ranks[0][name]) for other in ranks[1:])]
