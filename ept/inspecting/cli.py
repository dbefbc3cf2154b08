"""``ept-inspect``: look into a saved adapter from the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..extras import train_extra

with train_extra("ept-inspect"):
    from rich.console import Console

    from ..files import write_json
    from ..saved import AdapterError, read_adapter
    from .console import print_inspection
    from .page import draw_inspection, write_page
    from .prune import prune_experts
    from .summary import inspect_adapter, select


def build_parser() -> argparse.ArgumentParser:
    """The options of ``ept-inspect``."""
    parser = argparse.ArgumentParser(
        prog="ept-inspect",
        description="What is in a saved adapter: pyramid, parameters, effective ranks, gates, dead experts, likeness "
        "of tasks. Reads adapter_config.json and adapter_model.safetensors; the base model is not needed.",
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="folder that save_pretrained or ept-train wrote")
    parser.add_argument("--task", metavar="NAME", help="only this task")
    parser.add_argument("--layers", metavar="PATTERN", help="only layers whose names match this regular expression")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write everything as JSON")
    parser.add_argument("--output", metavar="DIR", type=Path, help="write heat maps (PNG) into this folder")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write one self-contained page to browse")
    parser.add_argument("--prune", metavar="OUT", type=Path, help="write a copy without the experts that no task uses")
    parser.add_argument("--quiet", action="store_true", help="no tables, only the names of written files")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``ept-inspect`` with these arguments (None: the process's); 0 on success.

    Raises:
        SystemExit: code 2, after a message that names what is wrong with the folder or an option.
    """
    parser = build_parser()
    options = parser.parse_args(argv)
    console = Console()
    try:
        saved = read_adapter(options.adapter)
        inspection = select(inspect_adapter(saved), task=options.task, layers=options.layers)
        if not options.quiet:
            print_inspection(inspection, console)
        written = []
        if options.json is not None:
            written.append(write_json(options.json, inspection.as_json()))
        if options.output is not None:
            written += draw_inspection(options.output, inspection, saved)
        if options.html is not None:
            written.append(write_page(options.html, inspection))
        for path in written:
            console.print(f"wrote {path}", soft_wrap=True, highlight=False, markup=False)
        if options.prune is not None:
            pruned = prune_experts(options.adapter, options.prune)
            line = "wrote {}: {} of {} experts, {:,} of {:,} numbers"
            numbers = (pruned.experts[1], pruned.experts[0], pruned.parameters[1], pruned.parameters[0])
            console.print(line.format(pruned.folder, *numbers), soft_wrap=True, highlight=False, markup=False)
    except AdapterError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
