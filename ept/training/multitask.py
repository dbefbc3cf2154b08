"""One encoder, one linear head per task; and what a model is and takes, whichever adapter (or none) it carries."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from ..data import TaskData, TaskSpec
from ..introspection import parameter_breakdown
from ..mixture import TaskMixture
from ..trainers import adapter_config

# Regression heads learn labels mapped linearly from the task's label_range onto this interval.
REGRESSION_TARGETS = (0.0, 1.0)


class TaskHeads(nn.Module):
    """All heads of a multi-task model, evaluated as one linear map.

    PEFT cannot wrap a bare ``nn.ModuleDict`` in ``modules_to_save``, so the dict lives inside this module. Task i's
    head is ``by_task["head_" + name]`` with weight ``[num_labels_i, hidden]``; the prefix keeps names such as
    ``type`` apart from the attributes of ``nn.ModuleDict``.
    """

    _exists: Tensor
    _columns: Tensor

    def __init__(self, hidden_size: int, specs: Sequence[TaskSpec]) -> None:
        super().__init__()
        self.by_task = nn.ModuleDict({f"head_{spec.name}": nn.Linear(hidden_size, spec.num_labels) for spec in specs})
        self._lay_out()

    def add(self, spec: TaskSpec, *, trains: bool) -> None:
        """A fresh head for one more task."""
        like: Any = next(iter(self.by_task.values()))
        head = nn.Linear(like.in_features, spec.num_labels, device=like.weight.device, dtype=like.weight.dtype)
        self.by_task[f"head_{spec.name}"] = head.requires_grad_(trains)
        self._lay_out()

    def finish(self, count: int) -> None:
        """Freeze the heads of the first ``count`` tasks; an adapter's ``add_task`` asks for it."""
        for head in list(self.by_task.values())[:count]:
            head.requires_grad_(False).zero_grad()

    def _lay_out(self) -> None:
        device = next(self.parameters()).device
        widths = torch.tensor([head.out_features for head in self.by_task.values()], device=device)
        slots = torch.arange(int(widths.max()), device=device)
        starts = widths.cumsum(0) - widths
        exists = slots < widths[:, None]
        self.register_buffer("_exists", exists, persistent=False)  # [T, max_labels]
        self.register_buffer(
            "_columns", (starts[:, None] + slots).where(exists, 0), persistent=False
        )  # [T, max_labels]

    def forward(self, pooled: Tensor, task_ids: Tensor) -> Tensor:
        """Logits ``[batch, max_labels]`` of pooled ``[batch, hidden]`` under each sample's own head (``[batch]``).

        Labels that a sample's task does not have get -inf, so softmax and argmax need no further mask.
        """
        heads: list[Any] = list(self.by_task.values())
        pooled = pooled.to(heads[0].weight.dtype)
        # A product for each: one for all would round a head's logits by how many heads there are.
        every = torch.cat([head(pooled) for head in heads], 1)  # [batch, sum of num_labels]
        return every.gather(1, self._columns[task_ids]).masked_fill(~self._exists[task_ids], float("-inf"))


class MultiTaskEncoder(nn.Module):
    """A text encoder, masked mean pooling and one linear head per task.

    Task i of ``specs`` has id i. The heads are trained and saved with an adapter through ``modules_to_save=["heads"]``.

    Args:
        encoder: a model that returns ``last_hidden_state [batch, length, hidden]`` and has ``config.hidden_size``.
        specs: the tasks, in the order of their ids.

    Raises:
        ValueError: no task, a name twice, a regression task without ``label_range``, or a multiple-choice task.
    """

    accepts_loss_kwargs = (
        False  # the loss is the batch mean; transformers' Trainer divides it by the accumulation steps
    )

    _is_regression: Tensor
    _low: Tensor
    _width: Tensor

    def __init__(self, encoder: Any, specs: Sequence[TaskSpec]) -> None:
        super().__init__()
        check_specs(specs)
        self.encoder = encoder
        self.config = encoder.config
        self.specs = tuple(specs)
        self.heads = TaskHeads(encoder.config.hidden_size, specs)
        self._set_labels()

    def add_task(self, spec: TaskSpec) -> None:
        """A head for one more task, in every copy of the heads that an adapter trains; see ``ept.training.add_task``.

        Raises:
            ValueError: as for the constructor.
        """
        check_specs([*self.specs, spec])
        self.specs = (*self.specs, spec)
        for name, module in list(self.named_modules()):
            if isinstance(module, TaskHeads):
                module.add(spec, trains=not name.endswith("original_module"))  # PEFT's frozen copy
        self._set_labels()

    def _set_labels(self) -> None:
        specs, device = self.specs, next(self.parameters()).device
        ranges = [spec.label_range if spec.kind == "regression" else REGRESSION_TARGETS for spec in specs]
        low, high = torch.tensor(ranges, dtype=torch.float32, device=device).unbind(1)
        self.register_buffer("_low", low, persistent=False)  # [T]
        self.register_buffer("_width", high - low, persistent=False)  # [T]
        is_regression = torch.tensor([spec.kind == "regression" for spec in specs], device=device)
        self.register_buffer("_is_regression", is_regression, persistent=False)  # [T]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        task_ids: Tensor | TaskMixture | int | None = None,
        labels: Tensor | None = None,
        head_ids: Tensor | int | None = None,
        **encoder_options: object,
    ) -> SequenceClassifierOutput:
        """Logits of every sample under its task's head and, given labels, the mean of the samples' losses.

        Args:
            input_ids, attention_mask, token_type_ids: int64 ``[batch, length]``; the last only if the encoder has it.
            task_ids: one id for the batch or int64 ``[batch]``; None, where there is one task. Of a mixture
                (``task_ids="auto"``), the likeliest task's head answers.
            head_ids: whose head answers and whose loss counts, where that is not to follow ``task_ids``.
            labels: ``[batch]``, class indices or regression labels in the unit of ``label_range``.

        Returns:
            ``loss`` (scalar or None) and ``logits [batch, max_labels]``, -inf where a task has fewer labels.

        Raises:
            ValueError: task_ids missing with several tasks, or not one a sample.
        """
        task_ids = self._task_ids(task_ids if head_ids is None else head_ids, input_ids)
        if token_type_ids is not None:
            encoder_options["token_type_ids"] = token_type_ids
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **encoder_options).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        pooled = (hidden * mask).sum(1) / mask.sum(1).clamp_min(1)
        logits = self.heads(pooled, task_ids)
        loss = None if labels is None else self.sample_losses(logits, labels, task_ids).mean()
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def export_parts(self, task_id: int) -> tuple[nn.Module, dict[str, Tensor], dict[str, object]]:
        """For ``ept.export_merged`` and its siblings: the encoder, a task's head, and how to use it.

        Returns:
            The encoder; ``weight [num_labels, hidden]`` and ``bias``; the task, its labels and the pooling: the mean of
            ``last_hidden_state`` over the tokens that ``attention_mask`` keeps.
        """
        spec = self.specs[task_id]
        head: Any = self.heads.by_task[f"head_{spec.name}"]
        description: dict[str, object] = {
            "task": spec.name,
            "kind": spec.kind,
            "pooling": "masked mean",
            "labels": spec.label_names,
        }
        if spec.kind == "regression":
            description |= {"label_range": spec.label_range, "output_range": REGRESSION_TARGETS}
        return self.encoder, {"weight": head.weight, "bias": head.bias}, description

    def activation_checkpointing_enable(self, **options: object) -> None:
        """Recompute the encoder's activations in the backward pass, as transformers' models do; same options."""
        self.encoder.activation_checkpointing_enable(**options)

    def sample_losses(self, logits: Tensor, labels: Tensor, task_ids: Tensor) -> Tensor:
        """Loss of every sample, fp32 ``[batch]``: cross entropy, or squared error on ``REGRESSION_TARGETS``.

        Both are computed for all samples and selected by task, so no sample's task is ever read back to the host.
        Under a regression head the cross entropy of its only label is exactly 0 and passes no gradient.
        """
        logits = logits.float()
        is_regression = self._is_regression[task_ids]
        classes = labels.long().masked_fill(is_regression, 0)
        low, high = REGRESSION_TARGETS
        wanted = (labels.float() - self._low[task_ids]) / self._width[task_ids] * (high - low) + low
        squared_error = (logits[:, 0] - wanted).square().where(is_regression, 0.0)
        return F.cross_entropy(logits, classes, reduction="none") + squared_error

    def predict(self, logits: Tensor, task_ids: Tensor | TaskMixture | int | None = None) -> Tensor:
        """What the logits ``[batch, max_labels]`` say, fp32 ``[batch]``: class index, or label in its own unit."""
        task_ids = self._task_ids(task_ids, logits)
        low, high = REGRESSION_TARGETS
        value = (logits[:, 0].float() - low) / (high - low) * self._width[task_ids] + self._low[task_ids]
        return value.where(self._is_regression[task_ids], logits.argmax(1).float())

    def _task_ids(self, task_ids: Tensor | TaskMixture | int | None, like: Tensor) -> Tensor:
        batch = like.shape[0]
        if task_ids is None and len(self.specs) > 1:
            raise ValueError(
                f"task_ids is missing: there are {len(self.specs)} tasks; pass one id a sample, int64 [{batch}]"
            )
        if isinstance(task_ids, TaskMixture):
            task_ids = task_ids.most_likely().to(like.device)
        if not isinstance(task_ids, Tensor):
            return torch.full((batch,), task_ids or 0, dtype=torch.int64, device=like.device)
        if task_ids.dim() and task_ids.shape != (batch,):
            raise ValueError(f"task_ids has shape {list(task_ids.shape)}; one id a sample is needed: [{batch}]")
        return task_ids.expand(batch)


def check_specs(specs: Sequence[TaskSpec]) -> None:
    names = [spec.name for spec in specs]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"specs has the tasks {names}; at least one task is needed, each name once")
    for spec in specs:
        if spec.kind == "multiple_choice":
            raise ValueError(
                f"specs: task {spec.name!r} is multiple choice, which a classification head cannot answer; "
                "use a text-to-label model (T5 or a causal language model)"
            )
        if spec.kind == "regression" and spec.label_range is None:
            raise ValueError(f"specs: regression task {spec.name!r} has no label_range; give (lowest, highest) label")


def base_model(model: nn.Module) -> nn.Module:
    """The model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def model_kind(model: nn.Module) -> str:
    """``encoder`` (a MultiTaskEncoder), ``seq2seq`` or ``causal``.

    Raises:
        TypeError: none of them.
    """
    base: Any = base_model(model)
    if isinstance(base, MultiTaskEncoder):
        return "encoder"
    if not hasattr(base, "generate"):
        raise TypeError(
            f"model is a {type(base).__name__}, which neither classifies nor generates; "
            "wrap an encoder in MultiTaskEncoder"
        )
    return "seq2seq" if base.config.is_encoder_decoder else "causal"


def trained_parameters(model: PeftModel) -> dict[str, int]:
    """Trained numbers by what they are: ``ept.parameter_breakdown``, or those of another adapter and the others."""
    if adapter_config(model) is not None:
        return parameter_breakdown(model)
    method: Any = model.peft_config[model.active_adapter].peft_type
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[method]
    counts = {"adapter": 0, "other": 0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts["adapter" if f".{prefix}" in name else "other"] += parameter.numel()
    return counts


def takes_task_ids(model: nn.Module) -> bool:
    """Whether the adapter or the model under it has a use for ``task_ids`` (a plain LoRA on T5 has none)."""
    if adapter_config(model) is not None:
        return True
    # Not PeftModel's own forward: for language models it names task_ids whatever the adapter.
    tuner = [model.base_model] if isinstance(model, PeftModel) else []
    return any("task_ids" in inspect.signature(part.forward).parameters for part in (base_model(model), *tuner))


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lives."""
    return next(model.parameters()).device


def ids_of_tasks(model: nn.Module, tasks: Sequence[TaskData]) -> list[int]:
    """Each task's id: its place among the model's tasks, or in the given sequence where the model names none.

    Raises:
        ValueError: no task, a task twice, one that the model does not have, or heads and adapter that disagree.
    """
    names = [task.spec.name for task in tasks]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"tasks are {names}; at least one is needed, each once")
    known = _task_names(model)
    if known is None:
        return list(range(len(names)))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"tasks: the model has no task {', '.join(map(repr, unknown))}; it has: {', '.join(known)}")
    return [known.index(name) for name in names]


def _task_names(model: nn.Module) -> list[str] | None:
    base, config = base_model(model), adapter_config(model)
    heads = [spec.name for spec in base.specs] if isinstance(base, MultiTaskEncoder) else None
    adapter = None if config is None or config.task_names is None else list(config.task_names)
    if heads is not None and adapter is not None and adapter[: len(heads)] != heads:
        raise ValueError(
            f"task_names of the adapter are {adapter}, but the heads are for {heads}; give both the same order"
        )
    return heads if heads is not None else adapter


def add_task(
    model: PeftModel, spec: TaskSpec, *, like: int | str | None = None, new_kernels: Sequence[int] = ()
) -> int:
    """Add a task to a trained model: an embedding to its EPT adapter and, to a ``MultiTaskEncoder``, a head.

    Only these train afterwards; every other task's output stays bit-identical. Make trainer and optimizer after
    the call: ``EPTTrainer(model, arguments, tasks=[the new task's data], ...)``.

    Args:
        like, new_kernels: as in ``model.add_task`` of the adapter: the task whose embedding it starts from (None: the
            mean of all), and experts of its own.

    Returns:
        The new task's id.

    Raises:
        ValueError: as ``model.add_task`` of the adapter, or a task that a head cannot learn; nothing has changed then.
    """
    base: Any = base_model(model)
    tuner: Any = model.base_model
    if not isinstance(base, MultiTaskEncoder):
        return tuner.add_task(spec.name, like=like, new_kernels=new_kernels)
    check_specs([*base.specs, spec])
    task = tuner.append_task(spec.name, like, new_kernels)
    base.add_task(spec)
    return task
