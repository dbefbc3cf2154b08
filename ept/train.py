"""``ept-train``: train one adapter on several tasks from the command line."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from .extras import train_extra

with train_extra("ept-train"):
    from rich.console import Console

    from .data import DataError, load_tasks, parse_roles
    from .files import WriteError, read_json
    from .models import ModelError
    from .training.checkpointing import newest_checkpoint
    from .training.options import OPTIONS, RunSettings, build_parser, option_of, parse
    from .training.report import quieten_libraries
    from .training.run import CHECKPOINT_FOLDER, METRICS_FILE, SETTINGS_FILE, make_adapted, train


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``ept-train`` with these arguments (None: the process's); 0 on success.

    Raises:
        SystemExit: code 2, after a message that names the option, if one is bad; nothing has been written then. Code 1,
            after a message, if the training stopped at values that are not finite or something could not be written.
            Code 130, after the command that resumes, if it was interrupted.
    """
    parser = build_parser()
    settings = parse(parser, argv)
    _check_output(parser, settings)
    quieten_libraries()
    try:
        tasks = load_tasks(
            settings.data,
            settings.tasks,
            columns=dict(map(parse_roles, settings.columns or ())),
            say=(lambda line: None) if settings.quiet else lambda line: print(line, flush=True),
        )
    except DataError as error:
        parser.error(f"argument --data, --tasks or --columns: {error}")
    try:
        model, tokenizer = make_adapted(settings, tasks)
    except ModelError as error:
        parser.error(f"argument --model: {error}")
    except ValueError as error:
        parser.error(f"argument --model, --tasks or --target-modules: {error}")
    try:
        train(settings, tasks, model, tokenizer, Console())
    except (FloatingPointError, WriteError) as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(
            130, f"{parser.prog}: interrupted; {_resumption(settings, sys.argv[1:] if argv is None else argv)}\n"
        )
    return 0


def _resumption(settings: RunSettings, argv: Sequence[str]) -> str:
    """How to go on with a run that was interrupted."""
    if newest_checkpoint(Path(settings.output) / CHECKPOINT_FOLDER) is None:
        return f"no checkpoint yet ({option_of('save_steps')} {settings.save_steps})"
    words = [word for word in argv if word not in ("--overwrite", "--resume")]
    return f"to go on: {shlex.join(['ept-train', *words, '--resume'])}"


def _check_output(parser: argparse.ArgumentParser, settings: RunSettings) -> None:
    output = Path(settings.output)
    if output.exists() and not output.is_dir():
        parser.error(f"argument --output: {str(output)!r} is a file; a folder is needed")
    existing = next((path for path in (output, *output.absolute().parents) if path.exists()), output)
    if not os.access(existing, os.W_OK):
        parser.error(f"argument --output: {str(existing)!r} cannot be written to")
    if settings.resume:
        _check_resumable(parser, settings, output)
    elif not settings.overwrite and any((output / name).exists() for name in (METRICS_FILE, CHECKPOINT_FOLDER)):
        parser.error(f"argument --output: {str(output)!r} holds an earlier run; add --resume or --overwrite")


def _check_resumable(parser: argparse.ArgumentParser, settings: RunSettings, output: Path) -> None:
    if newest_checkpoint(output / CHECKPOINT_FOLDER) is None:
        parser.error(f"argument --resume: no complete checkpoint in {str(output / CHECKPOINT_FOLDER)!r}")
    try:
        earlier = read_json(output / SETTINGS_FILE)
    except (FileNotFoundError, ValueError) as error:
        parser.error(f"argument --resume: the earlier run's settings cannot be read: {error}")
    if not isinstance(earlier, dict):
        parser.error(f"argument --resume: {str(output / SETTINGS_FILE)!r} holds no settings")
    processes = int(os.environ.get("WORLD_SIZE", 1))  # as the launcher says; torch.distributed has not started yet
    if earlier.get("processes", processes) != processes:
        parser.error(f"argument --resume: the run had {earlier['processes']} processes, this one has {processes}")
    absent = asdict(RunSettings(output=""))  # a run from before an option existed was as the option's default is
    for name, value in asdict(settings).items():
        value, before = (list(v) if isinstance(v, tuple) else v for v in (value, earlier.get(name, absent[name])))
        if OPTIONS[name].decides and before != value:
            parser.error(f"argument {option_of(name)}: {value!r} differs from {before!r} of the run to resume")


if __name__ == "__main__":
    sys.exit(main())
