"""Expert Pyramid Tuning: one frozen model, many tasks (arXiv 2603.12577). Importing registers EPT with PEFT."""

from ept_kernels._moved import install as _install

from ._moved import MOVED as _MOVED
from .adapted_linear import watch_registrations as _watch_registrations
from .baselines.dcft import DCFTConfig, DCFTLinear
from .baselines.mixlora import MixLoRAConfig, MixLoRALinear
from .baselines.moelora import MOELoRAConfig, MOELoRALinear
from .baselines.more import MoREConfig, MoRELinear
from .baselines.tucka.adapter import TuckAConfig, TuckALinear
from .checking import check_rows
from .config import EPTConfig
from .context import row_layout, use_tasks
from .export import apply_delta, export_deltas, export_lora, export_merged, load_deltas
from .introspection import (
    adapters,
    fix_route,
    free_route,
    group_load,
    parameter_breakdown,
    print_parameter_breakdown,
    routing,
    task_embeddings,
    task_names,
)
from .losses import auxiliary_loss, auxiliary_losses, contrastive_loss
from .mixture import TaskMixture
from .predict import Predictor, load
from .pyramid.linear import EPTLinear
from .pyramid.optim import parameter_groups
from .recompute import checkpoint
from .recompute import remember_tasks as _remember_tasks
from .suggest import SuggestedPyramid, suggest_pyramid
from .task_table import TaskTable
from .trainers import EPTTrainerMixin, TaskCollator
from .tuner import EPTModel
from .tuner.model import register as _register
from .version import __version__

__all__ = [
    "DCFTConfig",
    "DCFTLinear",
    "EPTConfig",
    "EPTLinear",
    "EPTModel",
    "EPTTrainerMixin",
    "MOELoRAConfig",
    "MOELoRALinear",
    "MixLoRAConfig",
    "MixLoRALinear",
    "MoREConfig",
    "MoRELinear",
    "Predictor",
    "SuggestedPyramid",
    "TaskCollator",
    "TaskMixture",
    "TaskTable",
    "TuckAConfig",
    "TuckALinear",
    "__version__",
    "adapters",
    "apply_delta",
    "auxiliary_loss",
    "auxiliary_losses",
    "check_rows",
    "checkpoint",
    "contrastive_loss",
    "export_deltas",
    "export_lora",
    "export_merged",
    "fix_route",
    "free_route",
    "group_load",
    "load",
    "load_deltas",
    "parameter_breakdown",
    "parameter_groups",
    "print_parameter_breakdown",
    "routing",
    "row_layout",
    "suggest_pyramid",
    "task_embeddings",
    "task_names",
    "use_tasks",
]

_register()
_remember_tasks()
_watch_registrations()
_install(_MOVED)
