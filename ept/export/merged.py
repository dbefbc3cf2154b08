"""``export_merged``: one task as an ordinary model of the base's own class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..adapted_linear import computes_weight
from ..tuner.model import EPTModel, ept_model
from ..tuner.quantised import is_quantised
from .parts import (
    check_target,
    choose_adapter,
    resolve_task,
    saved_modules,
    shadow,
    take_parts,
    write_folder,
    write_head,
)
from .parts import dequantise as dequantise_weights


def export_merged(
    model: nn.Module,
    task: int | str | None,
    path: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    adapter_name: str | None = None,
    dequantise: bool = False,
    overwrite: bool = False,
    **save_options: Any,
) -> Path:
    """Write one task as a plain transformers model; it loads with ``AutoModel...`` where ``ept`` is not installed.

    The base class's own ``save_pretrained`` writes it, with the task's updates in the weights and with the modules
    trained beside the adapter (``modules_to_save``). The model stays as it is; the merged weights of the adapted
    layers are held beside it until they are written, and nothing else is copied. The sum is rounded once, to the dtype
    of the weight: in fp32 the logits are the adapted model's to about 1e-6.

    A base with a method ``export_parts`` (``ept.training.MultiTaskEncoder``: an encoder with masked mean pooling and a
    linear head a task, which no ``AutoModelFor...`` computes) is written as its encoder, for ``AutoModel``, beside
    ``head.safetensors`` with the task's head and ``head.json``, which says how to use it.

    Args:
        model: a ``PeftModel`` of one of this package's methods.
        task: id or name; None where there is one task.
        path: folder to write. It appears complete or not at all.
        tokenizer: saved beside the model.
        adapter_name: default: the active one.
        dequantise: write a quantised base (bitsandbytes, torchao, HQQ) as floating point: what it holds, not what it
            was quantised from. Its own activations may be quantised too, so logits differ a little.
        overwrite: replace the whole folder where it is not empty.
        save_options: for ``save_pretrained``, such as ``max_shard_size``.

    Returns:
        ``path``.

    Raises:
        ValueError: a method that does not merge, an unknown task, an adapter that is not there, a quantised base
            without ``dequantise``, an adapted weight that is shared with a module that is not adapted, or a weight
            anywhere that is computed at every call where the base's class has an ordinary one.
        TypeError: a base without ``save_pretrained``.
        FileExistsError: a file, or a folder with content.
    """
    tuner = ept_model(model)
    name = choose_adapter(tuner, adapter_name)
    resolved = resolve_task(tuner, name, task)
    target = check_target(path, overwrite)
    _check_quantised(tuner, dequantise)
    tuner.check_mergeable(name)
    twin = shadow(tuner, name)
    if dequantise:
        dequantise_weights(twin)
    saved = saved_modules(twin, name)
    plain = twin.merge_and_unload(adapter_names=[name], task=resolved)
    parts = take_parts(plain, saved, resolved)
    whole = parts.model
    if not isinstance(whole, PreTrainedModel):
        raise TypeError(
            f"model must adapt a transformers model, which has save_pretrained; its base is {type(plain).__name__}"
        )
    _check_loads(whole)

    def write(folder: Path) -> None:
        whole.save_pretrained(folder, **save_options)
        write_head(folder, parts)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    return write_folder(target, write)


def _check_loads(model: PreTrainedModel) -> None:
    """Refuse computed weights that the class does not build itself: a loaded model would get fresh ones in their place.

    Raises:
        ValueError: a weight that is parametrised, normed or pruned.
    """
    computed = [path for path, module in model.named_modules() if computes_weight(module)]
    if not computed:
        return
    with torch.device("meta"):
        known = type(model)(model.config).state_dict()
    for path in computed:
        if not {f"{path}.{key}" for key in model.get_submodule(path).state_dict()} <= known.keys():
            raise ValueError(
                f"module {path!r} computes its weight at every call (a parametrisation, weight_norm, spectral_norm, "
                f"pruning), which a {type(model).__name__} when loaded would not: make it an ordinary parameter first"
            )


def _check_quantised(tuner: EPTModel, allowed: bool) -> None:
    if allowed:
        return
    for path, module in tuner.model.named_modules():
        if is_quantised(module):
            raise ValueError(
                f"dequantise is False, but {path!r} has a quantised weight ({type(module.weight).__name__}), which a "
                "merged model cannot keep without loss: pass dequantise=True for a floating-point one, or "
                "use ept.export_lora, which needs no merging"
            )
