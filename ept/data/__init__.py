"""Multi-task text data: what a task is, where it comes from, and how it is put to a text-to-label model."""

from ..extras import train_extra

with train_extra("ept.data"):
    from .formatting import parse_target, prompt, target
    from .load import load_tasks
    from .spec import DataError, TaskData, TaskSpec

__all__ = ["DataError", "TaskData", "TaskSpec", "load_tasks", "parse_target", "prompt", "target"]
