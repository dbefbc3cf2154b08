"""``ept-export``: merged models, deltas and LoRA from the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..introspection import task_names
from .deltas import export_deltas, load_deltas
from .load import load_adapter
from .lora import export_lora
from .merged import export_merged
from .parts import check_target


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``ept-export``."""
    parser = argparse.ArgumentParser(prog="ept-export", description="Export a trained adapter for other servers.")
    commands = parser.add_subparsers(dest="command", required=True)
    helps = {
        "merged": "a plain transformers model of one task",
        "deltas": "all tasks as one seed and a few numbers each",
        "lora": "one task as a LoRA adapter of PEFT",
    }
    for name, text in helps.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("adapter", help="folder of ept-train, or of PEFT's save_pretrained")
        command.add_argument("output", help="folder to write")
        command.add_argument("--base", help="base model: name or folder (default: the adapter's)")
        command.add_argument("--num-labels", type=int, help="outputs of a classification head")
        command.add_argument("--overwrite", action="store_true", help="replace the whole output folder")
        if name != "deltas":
            command.add_argument("--task", help="name or id; needed where there are several")
        if name == "lora":
            command.add_argument("--rank", type=int, help="largest rank of a layer (default: exact)")
            command.add_argument("--rank-pattern", action="store_true", help="no padding: every layer at its own rank")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``ept-export`` with these arguments (None: the process's); 0 on success.

    Raises:
        SystemExit: code 2, after a message; nothing has been written then.
    """
    parser = build_parser()
    options = parser.parse_args(argv)
    for option in ("num_labels", "rank"):
        value = getattr(options, option, None)
        if value is not None and value < 1:
            parser.error(f"argument --{option.replace('_', '-')}: must be an integer >= 1, got {value}")
    try:
        check_target(options.output, options.overwrite, option="--overwrite")
        model, tokenizer = load_adapter(options.adapter, options.base, num_labels=options.num_labels)
        if options.command == "deltas":
            deltas = load_deltas(export_deltas(model, options.output, overwrite=options.overwrite))
            print(f"{len(deltas.tasks)} tasks of {len(deltas.layers)} layers: {options.output}")
            return 0
        task = _task(task_names(model), options.task)
        if options.command == "merged":
            export_merged(model, task, options.output, tokenizer=tokenizer, overwrite=options.overwrite)
            print(f"merged: {options.output}")
        else:
            choices = {"rank_pattern": options.rank_pattern, "overwrite": options.overwrite}
            report = export_lora(model, task, options.output, options.rank, **choices)
            print(
                f"LoRA of rank {report.max_rank} and {report.parameters:,d} parameters, "
                f"relative error {report.error:.1e}: {options.output}"
            )
    except (OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    return 0


def _task(names: list[str], text: str | None) -> int:
    """A task by its name, else by its id.

    Raises:
        ValueError: none of this adapter's, or none given where there are several.
    """
    if text is None and len(names) == 1:
        return 0
    if text in names:
        return names.index(text)
    if text is not None and text.isdecimal() and int(text) < len(names):
        return int(text)
    wrong = "must be given" if text is None else f"unknown task {text!r}"
    raise ValueError(f"argument --task: {wrong}; allowed: {', '.join(names)}, or 0 to {len(names) - 1}")


if __name__ == "__main__":
    sys.exit(main())
