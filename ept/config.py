"""``EPTConfig``: every hyperparameter of an Expert Pyramid Tuning adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from peft.config import PeftConfig

from ept_kernels.geometry import check_kernel_sizes

from .peft_type import EPT


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass
class EPTConfig(PeftConfig):
    """Configuration of Expert Pyramid Tuning (arXiv 2603.12577).

    Args:
        r: rank of the shared seed ``Z = B @ A``.
        lora_alpha: the update is scaled by ``lora_alpha / r``.
        kernel_sizes: the pyramid: one entry per expert, its deconvolution kernel's size.
        top_k: experts that the router mixes for a task.
        num_tasks: rows of the task-embedding table. Taken from ``task_names`` where that is given.
        task_names: optional names, in the order of the ids; then ``task_ids`` may be given by name.
        lora_dropout: dropout on the adapter's input, in [0, 1).
        alp_scaling: multiply scale ``k`` by ``ceil(out / k) / ceil(out / k_min)``; False is the ablation "w/o ALP".
        task_embedding_dim: width of a task embedding. None: the commonest input width among the adapted layers, so that
            the contrastive loss can compare the embeddings with representations.
        task_similarity: expected cosine of two tasks' embeddings at the start, in [0, 1): how much the tasks begin with
            the same experts.
        temperature: of the contrastive loss's cosine similarities.
        contrastive_weight: weight of the contrastive loss in the total; 0 switches it off.
        init_seed: "gaussian" (the method) or "zero" (the paper's ablation: ``B`` starts at zero).
        target_modules: names or a regular expression of the modules to adapt, or "all-linear". None: PEFT's default for
            the architecture.
        exclude_modules: names or a regular expression of modules never to adapt.
        layers_to_transform, layers_pattern: restrict to these layer indices, as in ``LoraConfig``.
        modules_to_save: other modules to train and to save with the adapter, such as a classification head.

    Raises:
        ValueError: a value out of its range; the message names the argument, the value and what is allowed.
    """

    r: int = field(default=8, metadata={"help": "Rank of the shared seed."})
    lora_alpha: float = field(default=32, metadata={"help": "The update is scaled by lora_alpha / r."})
    kernel_sizes: tuple[int, ...] = field(
        default=(2, 2, 4, 4, 6, 6, 8, 8), metadata={"help": "Deconvolution kernel size of every expert."}
    )
    top_k: int = field(default=2, metadata={"help": "Experts mixed for a task."})
    num_tasks: int = field(default=8, metadata={"help": "Rows of the task-embedding table."})
    task_names: list[str] | None = field(default=None, metadata={"help": "Names of the tasks, by id."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input."})
    alp_scaling: bool = field(default=True, metadata={"help": "Dimension-aware scaling of the Adaptive LoRA Pruner."})
    task_embedding_dim: int | None = field(default=None, metadata={"help": "Width of a task embedding."})
    task_similarity: float = field(default=0.75, metadata={"help": "Cosine of two task embeddings at the start."})
    temperature: float = field(default=0.05, metadata={"help": "Temperature of the contrastive loss."})
    contrastive_weight: float = field(default=0.1, metadata={"help": "Weight of the contrastive loss."})
    init_seed: str = field(default="gaussian", metadata={"help": "'gaussian' or 'zero'."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to adapt."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules never to adapt."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layer indices to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Other modules to train and save."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = EPT
        self.kernel_sizes = check_kernel_sizes(self.kernel_sizes)
        experts = len(self.kernel_sizes)
        _check(_is_int(self.r) and self.r >= 1, f"r must be an integer >= 1, got {self.r!r}")
        _check(
            _is_number(self.lora_alpha) and self.lora_alpha > 0,
            f"lora_alpha must be a number > 0, got {self.lora_alpha!r}",
        )
        _check(
            _is_int(self.top_k) and 1 <= self.top_k <= experts,
            f"top_k must be an integer from 1 to {experts} (the number of experts in kernel_sizes), got {self.top_k!r}",
        )
        self._check_tasks()
        _check(
            _is_number(self.lora_dropout) and 0 <= self.lora_dropout < 1,
            f"lora_dropout must be a number in [0, 1), got {self.lora_dropout!r}",
        )
        _check(isinstance(self.alp_scaling, bool), f"alp_scaling must be True or False, got {self.alp_scaling!r}")
        _check(
            self.task_embedding_dim is None or (_is_int(self.task_embedding_dim) and self.task_embedding_dim >= 1),
            f"task_embedding_dim must be None or an integer >= 1, got {self.task_embedding_dim!r}",
        )
        _check(
            _is_number(self.task_similarity) and 0 <= self.task_similarity < 1,
            f"task_similarity must be a number in [0, 1), got {self.task_similarity!r}",
        )
        _check(
            _is_number(self.temperature) and self.temperature > 0,
            f"temperature must be a number > 0, got {self.temperature!r}",
        )
        _check(
            _is_number(self.contrastive_weight) and self.contrastive_weight >= 0,
            f"contrastive_weight must be a number >= 0, got {self.contrastive_weight!r}",
        )
        _check(
            self.init_seed in ("gaussian", "zero"), f"init_seed must be 'gaussian' or 'zero', got {self.init_seed!r}"
        )
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))

    def _check_tasks(self) -> None:
        if self.task_names is not None:
            names = [self.task_names] if isinstance(self.task_names, str) else list(self.task_names)
            _check(
                bool(names) and all(isinstance(name, str) and name for name in names) and len(set(names)) == len(names),
                f"task_names must be distinct, non-empty strings, got {self.task_names!r}",
            )
            self.task_names = names
            default = type(self).__dataclass_fields__["num_tasks"].default
            _check(
                self.num_tasks in (default, len(names)),
                f"num_tasks={self.num_tasks!r} contradicts the {len(names)} task_names; leave one of them out",
            )
            self.num_tasks = len(names)
        _check(
            _is_int(self.num_tasks) and self.num_tasks >= 1,
            f"num_tasks must be an integer >= 1, got {self.num_tasks!r}",
        )
