"""Keeping a trained adapter with all that is needed to use it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from .. import models
from ..data import TaskSpec
from ..files import ADAPTER_FOLDER, TASKS_FILE, read_json, write_atomically, write_json
from ..saved import read_adapter
from .finite import refuse_nonfinite
from .multitask import MultiTaskEncoder

_FORMAT = 1


def load_base(name: str, specs: Sequence[TaskSpec]) -> tuple[nn.Module, PreTrainedTokenizerBase, str]:
    """A model ready for an adapter (an encoder with its heads on), its tokenizer and its kind.

    Raises:
        ept.models.ModelError: see `ept.models.load`.
        ValueError: a task that an encoder cannot learn.
    """
    loaded = models.load(name)
    model = MultiTaskEncoder(loaded.model, specs) if loaded.kind == "encoder" else loaded.model
    return model, loaded.tokenizer, loaded.kind


def save_trained(
    output_dir: str | Path,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    specs: Sequence[TaskSpec],
    *,
    base_model: str,
) -> Path:
    """Write ``<output_dir>/adapter``: PEFT's adapter files, the tokenizer, and the tasks and base model's name.

    Either the whole folder is replaced or nothing is. Returns its path.

    Raises:
        FloatingPointError: a trained weight is not finite.
        ept.files.WriteError: the folder cannot be written.
    """
    refuse_nonfinite(model, everywhere=False)

    def write(folder: Path) -> None:
        model.save_pretrained(str(folder))
        tokenizer.save_pretrained(folder)
        content = {"format": _FORMAT, "base_model": base_model, "tasks": [asdict(spec) for spec in specs]}
        write_json(folder / TASKS_FILE, content)

    return write_atomically(Path(output_dir) / ADAPTER_FOLDER, write)


def load_trained(output_dir: str | Path) -> tuple[PeftModel, PreTrainedTokenizerBase, list[TaskSpec]]:
    """The model with its trained adapter, in evaluation mode, its tokenizer, and the tasks in the order of their ids.

    Args:
        output_dir: what ``ept-train --output`` named, or its ``adapter`` folder.

    Raises:
        FileNotFoundError: no trained adapter there.
        ValueError: its task file is damaged, of another format or of another adapter, or the adapter is damaged or not
            stored as safetensors.
    """
    folder = Path(output_dir)
    if not (folder / TASKS_FILE).is_file():
        folder = folder / ADAPTER_FOLDER
    if not (folder / TASKS_FILE).is_file():
        raise FileNotFoundError(
            f"output_dir {str(output_dir)!r} holds no trained adapter ({ADAPTER_FOLDER}/{TASKS_FILE})"
        )
    content = read_json(folder / TASKS_FILE)
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{str(folder / TASKS_FILE)!r} is not of format {_FORMAT}")
    saved = read_adapter(folder)
    base_model, tasks = content.get("base_model"), content.get("tasks")
    if not isinstance(base_model, str) or not isinstance(tasks, list) or not tasks:
        raise ValueError(f"{str(folder / TASKS_FILE)!r} must hold base_model, a string, and tasks, a list")
    try:
        specs = [_spec(entry) for entry in tasks]
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{str(folder / TASKS_FILE)!r} holds a damaged task: {error}") from error
    if saved.task_names and saved.task_names != [spec.name for spec in specs]:
        raise ValueError(
            f"{str(folder / TASKS_FILE)!r} holds the tasks {[spec.name for spec in specs]}, the adapter beside it "
            f"{saved.task_names}"
        )
    base, tokenizer, _ = load_base(base_model, specs)
    return PeftModel.from_pretrained(base, folder).eval(), tokenizer, specs


def _spec(entry: dict[str, Any]) -> TaskSpec:
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()}
    return TaskSpec(**fields)
