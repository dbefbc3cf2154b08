"""Methods of transformers' models that choose among the samples, or share what belongs to none of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..context import current
from ..mixture import TaskMixture


class SampleByFunction:
    """A method of DeBERTa's attention that projects the embeddings of relative positions, for each sample by itself.

    These are one for all samples, and a projection that is adapted gives something else for every task. With one task
    in the batch the method runs as it is.

    An object, not a closure, so that ``copy.deepcopy`` of the model rebinds it to the copy.
    """

    def __init__(self, module: nn.Module, method: str) -> None:
        self.module, self.method = module, method

    def __call__(
        self, query_layer: Tensor, key_layer: Tensor, relative_pos: Tensor | None, *args: Any, **kwargs: Any
    ) -> Any:
        method = getattr(type(self.module), self.method)
        context = current()
        count = None if context is None or context.uniform or context.shape is not None else context.count
        if context is None or count in (None, 0, 1) or len(query_layer) % count:
            return method(self.module, query_layer, key_layer, relative_pos, *args, **kwargs)
        own = relative_pos is not None and relative_pos.dim() > 2 and len(relative_pos) == count
        parts = []
        for sample, (query, key) in enumerate(zip(query_layer.chunk(count), key_layer.chunk(count), strict=True)):
            with context.serving(slice(sample, sample + 1)):
                positions = relative_pos[sample : sample + 1] if own and relative_pos is not None else relative_pos
                parts.append(method(self.module, query, key, positions, *args, **kwargs))
        return torch.cat(parts)


class SelectedSamples:
    """Whisper's ``generate_with_fallback``, which goes on with those recordings that have not ended.

    An object, not a closure, so that ``copy.deepcopy`` of the model rebinds it to the copy.
    """

    def __init__(self, module: nn.Module, method: str) -> None:
        self.module, self.method = module, method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        method = getattr(type(self.module), self.method)
        context = current()
        count = None if context is None or context.uniform else context.count
        rows, total = kwargs.get("batch_idx_map"), kwargs.get("batch_size")
        if context is None or count in (None, 0, 1) or rows is None or not total or total % count:
            return method(self.module, *args, **kwargs)
        tasks: Any = context.task_ids  # resolved by the generation
        device = tasks.weights.device if isinstance(tasks, TaskMixture) else tasks.device
        with context.serving(torch.tensor(rows, device=device) // (total // count)):
            return method(self.module, *args, **kwargs)
