"""A trained adapter from its folder, base model and all: for the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from peft.utils import CONFIG_NAME
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from ..files import ADAPTER_FOLDER, TASKS_FILE
from ..saved import read_adapter

if TYPE_CHECKING:
    from ..data import TaskSpec  # needs the extra [train]

_AUTO_CLASS: dict[str | None, Any] = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "FEATURE_EXTRACTION": AutoModel,
    None: AutoModel,
}


def load_adapter(
    adapter: str | Path, base: str | None = None, *, num_labels: int | None = None
) -> tuple[PeftModel, PreTrainedTokenizerBase | None]:
    """The adapted model in evaluation mode, and the tokenizer that lies beside the adapter or its base, or None.

    Args:
        adapter: what ``ept-train --output`` named, or a folder of PEFT's ``save_pretrained``.
        base: name or folder of the base model; None: the one that the adapter's config names.
        num_labels: outputs of a classification head; None: the base config's.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: the adapter is damaged or not stored as safetensors, has no base, or a task type that is not served.
    """
    model, tokenizer, _ = load_with_tasks(adapter, base, num_labels=num_labels)
    return model, tokenizer


def load_with_tasks(
    adapter: str | Path, base: str | None = None, *, num_labels: int | None = None
) -> tuple[PeftModel, PreTrainedTokenizerBase | None, list[TaskSpec] | None]:
    """As ``load_adapter``, and the tasks that ``ept-train`` wrote down; None of an adapter that it did not train."""
    folder = Path(adapter)
    if (folder / TASKS_FILE).is_file() or (folder / ADAPTER_FOLDER / TASKS_FILE).is_file():
        if base is not None:
            raise ValueError(
                f"argument --base: {base!r} is not for {str(folder)!r}, which ept-train wrote and which names its own"
            )
        from ..training.saving import load_trained  # needs the extra [train]

        return load_trained(folder)
    if not (folder / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"adapter {str(adapter)!r} holds no {CONFIG_NAME}")
    config = read_adapter(folder).config
    source = base or config.base_model_name_or_path
    if not source:
        raise ValueError(f"adapter {str(adapter)!r} does not say what its base model is; name it with --base")
    if config.task_type not in _AUTO_CLASS:
        raise ValueError(f"task_type of the adapter is {config.task_type!r}; allowed: {list(_AUTO_CLASS)}")
    revision = config.revision if base is None else None
    model = _load_base(source, _AUTO_CLASS[config.task_type], num_labels, revision)
    tokenizers = [place for place in (folder, source) if (Path(place) / "tokenizer_config.json").is_file()]
    tokenizer = AutoTokenizer.from_pretrained(tokenizers[0]) if tokenizers else None
    return PeftModel.from_pretrained(model, folder).eval(), tokenizer, None


def _load_base(source: str, auto_class: Any, num_labels: int | None, revision: str | None) -> nn.Module:
    """The base model, at the revision that the adapter was trained on; no code of its repository is run."""
    options: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": False}
    labels = {} if num_labels is None else {"num_labels": num_labels}
    base_config = AutoConfig.from_pretrained(source, **options, **labels)
    return auto_class.from_pretrained(source, config=base_config, use_safetensors=True, **options)
