"""Multi-task text data: what a task is, where it comes from, and how it is put to a text-to-label model."""

from ..extras import train_extra

with train_extra("ept.data"):
    from .formatting import parse_target, prompt, target
    from .load import load_tasks
    from .spec import DataError, TaskData, TaskSpec, make_split
    from .tables import Roles, load_tables, parse_roles

__all__ = [
    "DataError",
    "Roles",
    "TaskData",
    "TaskSpec",
    "load_tables",
    "load_tasks",
    "make_split",
    "parse_roles",
    "parse_target",
    "prompt",
    "target",
]
