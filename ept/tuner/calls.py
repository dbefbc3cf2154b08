"""What a call of a model holds: its main input, its masks, and what its task ids stand for."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..mixture import TaskMixture
from ..tasks import TaskIds, flat_ids

if TYPE_CHECKING:
    pass


#: transformers' label of a token that the loss leaves out.
IGNORED = -100

_BATCHED = (
    "input_ids",
    "inputs_embeds",
    "pixel_values",
    "pixel_values_videos",
    "input_values",
    "input_features",
    "past_values",
    "decoder_input_ids",
    "decoder_inputs_embeds",
)


def main_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The tensor of a call whose first dimension is the batch, or None where no usual input is found."""
    candidates = [kwargs.get(name) for name in _BATCHED] + list(args)
    return next((value for value in candidates if isinstance(value, Tensor) and value.dim() > 1), None)


def batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Samples in a call's inputs, or None where no usual input is found."""
    x = main_input(args, kwargs)
    return None if x is None else x.shape[0]


def has_sequence(x: Tensor | None, kwargs: dict[str, Any]) -> bool:
    """Whether the main input of a call holds more than one vector or token for each sample."""
    if x is None or x.dim() > 2:
        return True
    return x.shape[1] > 1 and (not x.is_floating_point() or x is kwargs.get("input_values"))


def decoder_of(model: Any) -> nn.Module | None:
    """The decoder of an encoder-decoder of transformers; None for any other model."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and hasattr(model, "get_decoder"):
        return model.get_decoder()
    return None


def decoder_mask(kwargs: dict[str, Any]) -> Tensor | None:
    """1 for the tokens of a call's decoder and 0 for its padding, ``[batch, sequence]``; None where not known.

    Where only ``labels`` are given, the model makes the decoder's tokens from them: one that is ignored is padding.
    """
    mask, labels = kwargs.get("decoder_attention_mask"), kwargs.get("labels")
    if mask is None and isinstance(labels, Tensor) and labels.dim() == 2:
        return labels != IGNORED
    return mask


@lru_cache(maxsize=64)
def _arguments(model_class: type[nn.Module]) -> frozenset[str]:
    return frozenset(inspect.signature(model_class.forward).parameters)


def takes(model: nn.Module, argument: str) -> bool:
    """Whether the wrapped model's forward names ``argument``: task ids, for example, to choose a head."""
    kind: Any = type(model)
    return argument in _arguments(kind)


@dataclass(frozen=True)
class Entries:
    """Ids of a call, in one dimension, and what each of them is for.

    Attributes:
        ids: as the caller gave them.
        shape: ``(batch, sequence)`` where layers see tokens with ids of their own; None with an id a sample.
        places: of packed samples, which of ``ids`` each token has, int64 ``[batch * sequence]``; None: its own.
        uniform: whether all ids are the same, as far as the host knows them.
    """

    ids: TaskIds | None
    shape: tuple[int, int] | None = None
    places: Tensor | None = None
    uniform: bool | None = None


def entries_of(task_ids: TaskIds | None, x: Tensor | None, kwargs: Mapping[str, Any]) -> Entries:
    """What ``task_ids`` are for.

    Args:
        x: the call's main input, ``[batch, ...]``: tokens ``[batch, sequence]``, or embeddings of these.
        kwargs: of the call. Samples that are packed (``DataCollatorWithFlattening``, packing and padding-free batches
            of TRL) are told apart by ``cu_seq_lens_q``, ``seq_idx`` or ``position_ids`` that start at 0 for each.

    Raises:
        ValueError: ids for every token of a batch of another shape, or another number of packed samples than of ids.
    """
    ids, shape = flat_ids(task_ids)
    uniform = len(set(ids)) == 1 if isinstance(ids, (list, tuple)) and all(map(_is_plain, ids)) else None
    if shape is not None:
        if x is None or x.dim() not in (2, 3) or x.shape[:2] != shape:
            wanted = "the batch" if x is None else f"the batch {list(x.shape)}"
            raise ValueError(
                f"task_ids must be 1-D, one a sample, or of the shape of the tokens of {wanted}, got {list(shape)}"
            )
        return Entries(ids, (shape[0], shape[1]), uniform=uniform)
    count = len(ids) if isinstance(ids, (list, tuple, np.ndarray, TaskMixture)) else None
    if isinstance(ids, Tensor) and ids.dim() == 1:
        count = ids.shape[0]  # len() is fixed when exported
    if count is None or x is None or x.dim() not in (2, 3) or count == x.shape[0]:
        return Entries(ids, uniform=uniform)
    batch, sequence = x.shape[:2]
    if batch == 1 and count == sequence:
        return Entries(ids, (batch, sequence), uniform=uniform)
    places = _places(count, batch, sequence, kwargs)
    return Entries(ids, None if places is None else (batch, sequence), places, uniform)


def _is_plain(task: object) -> bool:
    return isinstance(task, (int, str))


def _places(count: int, batch: int, sequence: int, kwargs: Mapping[str, Any]) -> Tensor | None:
    """The packed sample of every token, or None where it is not known where samples begin."""
    ends = next((kwargs[name] for name in ("cu_seq_lens_q", "cu_seqlens") if kwargs.get(name) is not None), None)
    if ends is not None and batch == 1:
        if len(ends) != count + 1:
            raise ValueError(f"task_ids must hold one id for each of the {len(ends) - 1} packed samples, got {count}")
        return torch.searchsorted(ends[1:].contiguous(), torch.arange(sequence, device=ends.device), right=True)
    index = kwargs.get("seq_idx")
    if isinstance(index, Tensor) and index.shape == (batch, sequence) and batch == 1:
        found = index.reshape(-1).long()
        _check((found[-1] + 1) == count, count, "seq_idx")
        return found
    positions = kwargs.get("position_ids")
    if isinstance(positions, Tensor) and positions.dim() == 3:  # one of several kinds of positions
        positions = positions[0]
    if not isinstance(positions, Tensor) or positions.shape != (batch, sequence):
        return None
    starts = positions.eq(0)
    found = starts.reshape(-1).cumsum(0) - 1
    _check((starts.sum() == count) & starts[:, 0].all(), count, "position_ids")
    return found


def packed_samples(tasks: Tensor, shape: tuple[int, int], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Which sample every token belongs to, and the samples' tasks, where the ids are one a token.

    Args:
        tasks: ``[batch * sequence]``. shape: ``(batch, sequence)``. kwargs: of the call, as for ``entries_of``.

    Returns:
        Samples ``[batch * sequence]``, and ``[batch * sequence]`` tasks, of which those after the last sample are no
        sample's; None where nothing tells samples apart.
    """
    ends = next((kwargs[name] for name in ("cu_seq_lens_q", "cu_seqlens") if kwargs.get(name) is not None), None)
    index, positions = kwargs.get("seq_idx"), kwargs.get("position_ids")
    if isinstance(positions, Tensor) and positions.dim() == 3:
        positions = positions[0]
    if isinstance(ends, Tensor) and shape[0] == 1:
        first = torch.zeros(shape[1] + 1, dtype=torch.bool, device=ends.device).index_fill(0, ends.long(), True)
        starts = first[None, :-1]
    elif isinstance(index, Tensor) and index.shape == shape:
        starts = F.pad(index[:, 1:] != index[:, :-1], (1, 0), value=True)
    elif isinstance(positions, Tensor) and positions.shape == shape:
        starts = positions == 0
    else:
        return None
    own = tasks.to(starts.device).view(shape)
    changes = F.pad(own[:, 1:] != own[:, :-1], (1, 0), value=True)
    places = (starts | changes).reshape(-1).cumsum(0) - 1
    return places, own.new_zeros(own.numel()).index_copy_(0, places, own.reshape(-1))


def _check(holds: Tensor, count: int, name: str) -> None:
    """Raise ValueError unless ``holds``; no host synchronisation on a GPU."""
    message = f"task_ids must hold one id for each of the packed samples that {name} tell apart, got {count} ids"
    if torch.compiler.is_compiling():
        torch._assert_async(holds, message)
        return
    try:
        torch._assert_async(holds, message)
    except RuntimeError as error:
        raise ValueError(message) from error
