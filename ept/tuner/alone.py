"""Parts of transformers' models that are called sample by sample, since all samples share an input of theirs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..context import current


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
        for sample, (query, key) in enumerate(
            zip(query_layer.chunk(count), key_layer.chunk(count), strict=True)
        ):
            with context.only(sample):
                positions = relative_pos[sample : sample + 1] if own and relative_pos is not None else relative_pos
                parts.append(method(self.module, query, key, positions, *args, **kwargs))
        return torch.cat(parts)
