"""A second model over the same tensors: it can be merged and unloaded while the first stays as it is."""

from __future__ import annotations

import copy

from torch import nn

from ..tuner.model import EPTModel
from ..tuner.quantised import dequantised, is_quantised


def shadow(tuner: EPTModel, adapter_name: str) -> EPTModel:
    """A copy of the tuner and its model with parameters of its own over the *same* storage; nothing is merged in it.

    Merging replaces a parameter's storage and never writes into it, so it takes memory for the merged weights alone
    and the original model does not notice.

    Args:
        adapter_name: made the active adapter, so that unloading leaves the modules trained with it.
    """
    memo: dict[int, object] = {id(tuner._trained): None}  # the last pass: may hold a graph, which cannot be copied
    for tensor in (*tuner.parameters(), *tuner.buffers()):
        plain = type(tensor) is nn.Parameter  # a quantised one is shared as it is: nobody replaces its storage
        memo[id(tensor)] = nn.Parameter(tensor.data, requires_grad=False) if plain else tensor
    quantizer = getattr(tuner.model, "hf_quantizer", None)
    memo[id(quantizer)] = quantizer
    twin = copy.deepcopy(tuner, memo)
    if twin.merged_task is not None:
        twin.unmerge_adapter()
    twin.set_adapter(adapter_name, inference_mode=True)
    return twin


def dequantise(twin: EPTModel) -> None:
    """Give every quantised module of a shadow an ordinary weight, in the dtype of the model's other parameters."""
    model = twin.model
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point() and type(p) is nn.Parameter)
    for path, module in list(model.named_modules()):
        if is_quantised(module):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, dequantised(module, dtype))
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
