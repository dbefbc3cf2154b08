"""The toy tasks, models and command line of the training tests."""

from training.conftest import command, source, tasks, toys

__all__ = ["command", "source", "tasks", "toys"]
