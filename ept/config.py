"""``EPTConfig``: every hyperparameter of an Expert Pyramid Tuning adapter."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from peft.utils.other import get_pattern_key

from ept_kernels.geometry import check_kernel_sizes

from .adapter_config import check, is_int
from .contrastive_config import ContrastiveConfig
from .peft_type import EPT

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass
class EPTConfig(ContrastiveConfig):
    """Configuration of Expert Pyramid Tuning (arXiv 2603.12577).

    Args:
        r: rank of the shared seed ``Z = B @ A``.
        lora_alpha: the update is scaled by ``lora_alpha / r``.
        kernel_sizes: the pyramid: one entry per expert, its deconvolution kernel's size.
        kernel_pattern: other kernel sizes for some layers of a model: ``{pattern: kernel_sizes}``, where a pattern is a
            regular expression for the end of a layer's name, as in ``LoraConfig.rank_pattern``; the first that matches
            counts. A layer without a model, such as an ``EPTLinear``, takes ``kernel_sizes``.
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
        auto_routing: keep statistics of each task's token embeddings during training, so that ``task_ids="auto"`` can
            find out the task of an unlabelled sample afterwards (``docs/tasks.md``).
        finished_tasks: the first so many tasks are finished: neither their embeddings nor anything that all tasks use
            trains. Set by ``model.add_task``.
        added_kernels: experts that came with tasks added later, ``((task, kernel sizes), ...)``: they follow those of
            ``kernel_sizes`` in every layer, and earlier tasks know nothing of them. Set by
            ``model.add_task(new_kernels=...)``.
        init_seed: "gaussian" (the method) or "zero" (the paper's ablation: ``B`` starts at zero).
        routing: "task" (the method): a task's embedding selects its experts. "token": every token selects its own, by a
            gate ``[E, in]`` on its own input. Then there are no task embeddings, ``task_ids`` are optional and change
            nothing, ``contrastive_weight`` is 0, and nothing can be merged.
        target_modules: names or a regular expression of the modules to adapt, or "all-linear". None: PEFT's default for
            the architecture.
        exclude_modules: names or a regular expression of modules never to adapt.
        layers_to_transform, layers_pattern: restrict to these layer indices, as in ``LoraConfig``; not with a regular
            expression, which can say it itself.
        modules_to_save: other modules to train and to save with the adapter, such as a classification head.
        rank_pattern, alpha_pattern, trainable_token_indices, bias, target_parameters, layer_replication: as in
            ``AdapterConfig``.
        row_layout: how the rows run that some layers see, as in ``AdapterConfig``.

    Raises:
        ValueError: a value out of its range; the message names the argument, the value and what is allowed.
    """

    kernel_sizes: tuple[int, ...] = field(
        default=(2, 2, 4, 4, 6, 6, 8, 8), metadata={"help": "Deconvolution kernel size of every expert."}
    )
    kernel_pattern: dict[str, tuple[int, ...]] | None = field(
        default=None, metadata={"help": "Kernel sizes of the layers whose names match a pattern."}
    )
    top_k: int = field(default=2, metadata={"help": "Experts mixed for a task."})
    alp_scaling: bool = field(default=True, metadata={"help": "Dimension-aware scaling of the Adaptive LoRA Pruner."})
    auto_routing: bool = field(default=False, metadata={"help": "Learn to find out the task of unlabelled samples."})
    finished_tasks: int = field(default=0, metadata={"help": "Tasks that must stay as they are; add_task sets it."})
    added_kernels: tuple[tuple[int, tuple[int, ...]], ...] | None = field(
        default=None, metadata={"help": "Experts of tasks that were added later; add_task sets it."}
    )
    init_seed: str = field(default="gaussian", metadata={"help": "'gaussian' or 'zero'."})
    routing: str = field(default="task", metadata={"help": "'task' or 'token': what selects experts."})

    def __post_init__(self) -> None:
        self.kernel_sizes = check_kernel_sizes(self.kernel_sizes)
        super().__post_init__()
        self.peft_type = EPT
        self._check_pattern()
        self._check_added()
        fewest = min((self.kernel_sizes, *(self.kernel_pattern or {}).values()), key=len)
        check(
            is_int(self.top_k) and 1 <= self.top_k <= len(fewest),
            f"top_k must be an integer from 1 to {len(fewest)} (the experts of {fewest}), got {self.top_k!r}",
        )
        check(isinstance(self.alp_scaling, bool), f"alp_scaling must be True or False, got {self.alp_scaling!r}")
        check(isinstance(self.auto_routing, bool), f"auto_routing must be True or False, got {self.auto_routing!r}")
        check(
            is_int(self.finished_tasks) and 0 <= self.finished_tasks <= self.num_tasks,
            f"finished_tasks must be an integer from 0 to num_tasks={self.num_tasks}, got {self.finished_tasks!r}",
        )
        check(
            isinstance(self.init_seed, str) and self.init_seed in ("gaussian", "zero"),
            f"init_seed must be 'gaussian' or 'zero', got {self.init_seed!r}",
        )
        check(
            isinstance(self.routing, str) and self.routing in ("task", "token"),
            f"routing must be 'task' or 'token', got {self.routing!r}",
        )
        if self.routing == "token":
            check(self.added_kernels is None, "added_kernels must be None with routing='token', which has no tasks")
            check(not self.auto_routing, "auto_routing must be False with routing='token', which asks for no tasks")
            check(self.finished_tasks == 0, "finished_tasks must be 0 with routing='token', which has no task table")
            default = type(self).__dataclass_fields__["contrastive_weight"].default
            check(
                self.contrastive_weight in (0, default),
                "contrastive_weight must be 0 or left out with routing='token', which has no task embeddings to train; "
                f"got {self.contrastive_weight!r}",
            )
            self.contrastive_weight = 0.0

    def _check_pattern(self) -> None:
        pattern = self.kernel_pattern
        if pattern is None:
            return
        check(isinstance(pattern, dict), f"kernel_pattern must be None or {{pattern: kernel sizes}}, got {pattern!r}")
        sizes = {}
        for key, value in pattern.items():
            try:
                re.compile(key)
                sizes[key] = check_kernel_sizes(value)
            except (re.error, TypeError, ValueError) as error:
                raise ValueError(f"kernel_pattern[{key!r}]={value!r}: {error}") from None
        self.kernel_pattern = sizes or None

    def _check_added(self) -> None:
        added = self.added_kernels
        if added is None:
            return
        wanted = f"added_kernels must be None or ((task, kernel sizes), ...), got {added!r}"
        try:
            pairs = tuple((task, check_kernel_sizes(sizes)) for task, sizes in added)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{wanted}: {error}") from None
        tasks = [task for task, _ in pairs]
        check(
            all(is_int(task) and 0 < task < self.num_tasks for task in tasks) and tasks == sorted(set(tasks)),
            f"{wanted}: tasks must be different, from 1 to {self.num_tasks - 1}, and in their order",
        )
        self.added_kernels = pairs or None

    @property
    def all_kernel_sizes(self) -> tuple[int, ...]:
        """Of every expert: ``kernel_sizes``, then those of ``added_kernels``."""
        return self.kernel_sizes + tuple(k for _, sizes in self.added_kernels or () for k in sizes)

    @property
    def stages(self) -> tuple[tuple[int, int], ...]:
        """``(first task, number of experts)`` of each group of tasks that knows the same experts, in their order."""
        found = [(0, len(self.kernel_sizes))]
        for task, sizes in self.added_kernels or ():
            found.append((task, found[-1][1] + len(sizes)))
        return tuple(found)

    def for_layer(self, name: str) -> Self:
        """As in ``AdapterConfig``, with the kernel sizes that ``kernel_pattern`` gives the layer."""
        config = super().for_layer(name)
        key = get_pattern_key(list(self.kernel_pattern or ()), name)
        if self.kernel_pattern is None or key not in self.kernel_pattern:
            return config
        config = copy.copy(config)
        config.kernel_sizes = self.kernel_pattern[key]
        return config
