"""What the libraries under a run print."""

from __future__ import annotations

import warnings

import transformers


def quieten_libraries() -> None:
    """Leave out what only a developer of the libraries wants to see: their loading bars and a deprecation in PEFT."""
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    transformers.utils.logging.disable_progress_bar()
