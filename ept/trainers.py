"""What makes any trainer of transformers or TRL right for an adapter of several tasks: a collator and a mixin."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from .config import AdapterConfig, EPTConfig
from .losses import auxiliary_losses
from .methods import method_of
from .pyramid.optim import GATE_LR_RATIO, KERNEL_LR_RATIO, parameter_groups
from .tuner.calls import IGNORED
from .tuner.model import ept_model

#: What a row's task may be called.
TASK_COLUMNS = ("task_ids", "task")

TASK_BATCHING = ("mixed", "single")

Row = Mapping[str, Any]

if TYPE_CHECKING:  # a mixin: the trainer comes after it
    _Trainer: Any
else:
    _Trainer = object


class TaskCollator:
    """Any collator of transformers or TRL, with the tasks of its rows in the batch, whatever else it drops.

    A collator that packs samples into one row (``DataCollatorWithFlattening``, TRL's with ``padding_free``) gives
    ``task_ids [samples]``, which the model spreads over their tokens, and one that pads them the same. Rows that TRL
    has packed give ``task_ids [batch, sequence]``, and a pair of answers (``DPOTrainer``) its task twice.

    Args:
        inner: makes a batch of rows without their tasks.
        task_names: the tasks in the order of their ids, if rows name them.
        column: the entry of a row that holds its task, an id or a name, or an id for every token of a row that was
            packed before. None: ``task_ids``, else ``task``.
    """

    def __init__(
        self,
        inner: Callable[[list[Any]], Any],
        task_names: Sequence[str] | None = None,
        *,
        column: str | None = None,
    ) -> None:
        self.inner, self.column = inner, column
        self.task_names = None if task_names is None else list(task_names)

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """A batch of ``rows`` with ``task_ids``, int64.

        Raises:
            ValueError: a row without a task, an unknown name, ids for every token of some rows only, or another number
                of them than of tokens.
        """
        column = self.column or next((name for name in TASK_COLUMNS if name in rows[0]), TASK_COLUMNS[0])
        ids = [self._ids(row, column) for row in rows]
        batch = dict(self.inner([{key: value for key, value in row.items() if key != column} for row in rows]))
        return {**batch, "task_ids": _fitted(ids, rows, batch, column)}

    def _ids(self, row: Row, column: str) -> Any:
        if column not in row:
            raise ValueError(
                f"a row has no task: {column!r} is missing, there is {', '.join(row)}. A trainer drops it where "
                "remove_unused_columns is True: set it to False, or train with ept.EPTTrainerMixin"
            )
        value = row[column]
        if not isinstance(value, str):
            return value
        if self.task_names is None or value not in self.task_names:
            known = "task_names is None" if self.task_names is None else f"task_names are {', '.join(self.task_names)}"
            raise ValueError(f"{column} of a row is {value!r}, which is no task: {known}")
        return self.task_names.index(value)


def _fitted(ids: Sequence[Any], rows: Sequence[Row], batch: Mapping[str, Any], column: str) -> Tensor:
    """One id for each row of the batch, for each sample in it, or for each token."""
    each = [torch.as_tensor(own).dim() == 1 for own in ids]
    x = batch.get("input_ids")
    shape = x.shape if isinstance(x, Tensor) else torch.Size([len(rows)])
    if not any(each):
        if "seq_lengths" in rows[0] and shape[0] == 1:  # several packed rows laid in one: their samples are not counted
            ids = [[own] * len(row["input_ids"]) for own, row in zip(ids, rows, strict=True)]
        else:
            pairs = "chosen_ids" in rows[0] and shape[0] == 2 * len(rows)  # all chosen, then all rejected
            return torch.as_tensor(ids).repeat(2 if pairs else 1)
    tokens = [torch.as_tensor(own).reshape(-1) for own in ids]
    lengths = [len(own) for own in tokens]
    if (any(each) and not all(each)) or sum(lengths) != shape.numel():
        raise ValueError(
            f"{column} must be one for each row or one for each token, with no padding among these; got {lengths} for "
            f"input_ids {list(shape)}"
        )
    return torch.cat(tokens).view(shape)


class TaskBalancedSampler(Sampler[int]):
    """Row indices into the concatenation of T tasks, each task drawn with probability 1/T.

    ``mixed`` draws the task of every sample, ``single`` that of every global batch, the same for all processes. Within
    a task, rows come without replacement in a fresh random order; a task drawn more often than it has rows starts over
    in another order.

    The order is a pure function of (seed, epoch): every process of a distributed run builds the same global order, of
    which the data loader hands it every world_size-th batch, and skipping the batches that a resumed run has already
    seen lands where the run stopped.

    An **epoch** is as many draws as the tasks have rows in total, rounded up to full global batches of
    ``batch_size * world_size``. Small tasks are thus seen several times and large ones in part.

    Args:
        sizes: rows of each task, T positive numbers.
        batch_size: samples of one batch of one process.
        world_size: number of processes that share the order.
        seed: non-negative.
        task_batching: one of ``TASK_BATCHING``.
        places: where the rows of the concatenation are, ``[sum of sizes]``; None: in its order.

    Raises:
        ValueError: an argument is not as above.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        batch_size: int,
        *,
        world_size: int = 1,
        seed: int = 0,
        task_batching: str = "mixed",
        places: np.ndarray | None = None,
    ) -> None:
        if not sizes or min(sizes) < 1:
            raise ValueError(f"sizes is {list(sizes)}; every task needs at least one row")
        if batch_size < 1 or world_size < 1 or seed < 0:
            raise ValueError(
                f"batch_size {batch_size} and world_size {world_size} must be at least 1, seed {seed} at least 0"
            )
        if task_batching not in TASK_BATCHING:
            raise ValueError(f"task_batching is {task_batching!r}; allowed: {', '.join(TASK_BATCHING)}")
        self.sizes = tuple(sizes)
        self.seed = seed
        self.task_batching = task_batching
        self.places = places
        self.epoch = 0
        self.global_batch = batch_size * world_size
        self._length = -(-sum(sizes) // self.global_batch) * self.global_batch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (from 0) whose order the next iteration yields."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        return iter(self.order().tolist())

    def order(self) -> np.ndarray:
        """The current epoch's row indices, int64 ``[len(self)]``."""
        random = np.random.default_rng([self.seed, self.epoch])
        repeats = self.global_batch if self.task_batching == "single" else 1
        tasks = random.integers(len(self.sizes), size=self._length // repeats).repeat(repeats)
        order = np.empty(self._length, dtype=np.int64)
        start = 0
        for task, size in enumerate(self.sizes):
            drawn = tasks == task
            count = int(drawn.sum())
            passes = [random.permutation(size) for _ in range(-(-count // size))]
            order[drawn] = start + np.concatenate([*passes, np.empty(0, np.int64)])[:count]
            start += size
        return order if self.places is None else self.places[order]


class SamplerEpoch(TrainerCallback):
    """Tells the sampler its epoch.

    accelerate does so only where it finds the sampler under its own wrappers, which it does not after skipping
    batches in a distributed run.
    """

    def __init__(self) -> None:
        self.sampler: TaskBalancedSampler | None = None

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.sampler is not None:
            self.sampler.set_epoch(int(state.epoch or 0))


def adapter_config(model: nn.Module) -> AdapterConfig | None:
    """The active adapter's config if it is of one of this package's methods; None for any other adapter or none."""
    if not isinstance(model, PeftModel) or not isinstance(model.active_adapter, str):
        return None
    config = model.peft_config[model.active_adapter]
    return config if isinstance(config, AdapterConfig) else None


def task_column(dataset: Any) -> str | None:
    """The column of a dataset of ``datasets`` that holds tasks, or None."""
    return next((name for name in TASK_COLUMNS if name in (getattr(dataset, "column_names", None) or ())), None)


class EPTTrainerMixin(_Trainer):
    """Put before a trainer, makes it train an adapter of this package by its recipe.

    ``class Mine(EPTTrainerMixin, SFTTrainer): pass`` serves ``transformers.Trainer``, ``Seq2SeqTrainer`` and TRL's
    ``SFTTrainer`` and ``DPOTrainer``; ``ept.training.EPTTrainer`` is the mixin on ``Trainer``. Rows name their task in
    a column ``task_ids`` or ``task``, an id or a name of ``task_names``. Then

    - the column reaches the model, whatever ``remove_unused_columns`` and the collator drop; TRL packs by task;
    - every task is drawn with probability 1/T (``TaskBalancedSampler``);
    - kernels and gates learn at their own rates (``ept.parameter_groups``);
    - the method's own losses count once an optimizer step, however it is divided into batches, and not in evaluation;
    - evaluation gives ``eval_<task>_loss`` for every task, and ``eval_loss``, their mean.

    Raises:
        ValueError: several GPUs in one process, an option that cannot be served, or a row of a task that the adapter
            does not have.
    """

    model: Any
    args: Any
    train_dataset: Any
    eval_dataset: Any
    data_collator: Any
    optimizer: Any
    _signature_columns: Any

    def __init__(self, *args: Any, **options: Any) -> None:
        self._sampler_epoch = SamplerEpoch()
        self._by_task = False  # whether eval_dataset is divided here
        given = options.get("args", args[1] if len(args) > 1 else None)
        if (count := getattr(given, "n_gpu", 1)) > 1:
            raise ValueError(
                f"args: {count} GPUs in one process would replicate the model without its method's loss; start one "
                "process per GPU with torchrun, or show it one GPU with CUDA_VISIBLE_DEVICES"
            )
        super().__init__(*args, **options)
        self._adapter_config = adapter_config(self.model)
        self._check_options()
        self._give_tasks()
        self.add_callback(self._sampler_epoch)

    def _check_options(self) -> None:
        base: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        is_pair = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
        # T5 and its kin take any keyword but return the batch's mean over tokens whatever num_items_in_batch says.
        self._means_tokens = is_pair and self.model_accepts_loss_kwargs and self.compute_loss_func is None
        if self._means_tokens and self.args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor is {self.args.label_smoothing_factor}, which is not served with an "
                f"encoder-decoder ({type(base).__name__}); set it to 0"
            )

    def _give_tasks(self) -> None:
        """Collator and evaluation by the rows' tasks, if they name them."""
        names = None if self._adapter_config is None else self._adapter_config.task_names
        evaluated = self.eval_dataset
        parts = list(evaluated.values()) if isinstance(evaluated, dict) else [evaluated]
        if not any(map(task_column, [self.train_dataset, *parts])):
            return
        if not isinstance(self.data_collator, TaskCollator):
            self.data_collator = TaskCollator(self.data_collator, names)
        elif self.data_collator.task_names is None:
            self.data_collator.task_names = names
        strategy = getattr(self.args, "train_sampling_strategy", "random")
        if task_column(self.train_dataset) and strategy != "random":
            raise ValueError(
                f"train_sampling_strategy is {strategy!r}; only 'random' is served, drawing every task alike often"
            )
        ids = None if isinstance(evaluated, dict) else self._row_tasks(evaluated)
        if ids is not None and hasattr(evaluated, "select"):
            found = np.unique(ids).tolist()
            self.eval_dataset = {
                str(task) if names is None else names[task]: evaluated.select(np.flatnonzero(ids == task))
                for task in found
            }
            self._by_task = True

    def _row_tasks(self, dataset: Any) -> np.ndarray | None:
        """The id of every row ``[N]``; None without such a column, or with ids of tokens in it."""
        column = task_column(dataset)
        if column is None or not hasattr(dataset, "__len__") or len(dataset) == 0:
            return None
        values = dataset[column][:]
        if isinstance(values[0], str):
            names = (self._adapter_config.task_names if self._adapter_config is not None else None) or []
            unknown = sorted(set(values) - set(names))
            if unknown:
                raise ValueError(f"{column} of a row is {unknown[0]!r}, which is none of the tasks {names}")
            values = [names.index(value) for value in values]
        ids = None if isinstance(values[0], (list, tuple)) else np.asarray(values)
        count = getattr(self._adapter_config, "num_tasks", None)
        if ids is not None and count is not None and not (ids.min() >= 0 and ids.max() < count):
            raise ValueError(f"{column} of a row is {ids.min()} or {ids.max()}; allowed: 0 to {count - 1}")
        return ids

    # ---- data

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *TASK_COLUMNS]))

    def _prepare_dataset(self, dataset: Any, *args: Any, **options: Any) -> Any:
        """TRL's, but packing, which would lose the tasks, packs each task by itself."""
        column = task_column(dataset)
        packs = options.get("packing", args[2] if len(args) > 2 else False)
        if column is None or packs is not True or not hasattr(dataset, "select"):
            return super()._prepare_dataset(dataset, *args, **options)
        from datasets import concatenate_datasets

        tasks = np.asarray(dataset[column][:])
        parts = []
        for task in np.unique(tasks).tolist():
            rows = dataset.select(np.flatnonzero(tasks == task))
            packed = super()._prepare_dataset(rows, *args, **options)
            parts.append(packed.add_column(column, [task] * len(packed)))
        return concatenate_datasets(parts)

    def _places(self, rows: Any) -> tuple[Sequence[int], np.ndarray | None] | None:
        """How many rows each task has, and where they are; None where rows do not name their tasks."""
        ids = self._row_tasks(rows)
        if ids is None:
            return None
        return np.unique(ids, return_counts=True)[1].tolist(), np.argsort(ids, kind="stable")

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows = self.train_dataset if train_dataset is None else train_dataset
        found = self._places(rows)
        if found is None:
            return super()._get_train_sampler(rows)
        sizes, places = found
        sampler = self._sampler_epoch.sampler = TaskBalancedSampler(
            sizes,
            self._train_batch_size,
            world_size=self.args.world_size,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            task_batching=getattr(self.args, "task_batching", TASK_BATCHING[0]),
            places=places,
        )
        return sampler

    # ---- the recipe

    def train(self, *args: Any, **options: Any) -> Any:
        """As in ``Trainer``.

        Raises:
            ValueError: an adapter that cannot be sharded yet, under FSDP.
        """
        if self.is_fsdp_enabled and self._adapter_config is not None:
            for shared in ept_model(self.model).ept_task_tables.values():
                method_of(self._adapter_config).adapter.check_shardable(shared)
        return super().train(*args, **options)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of ``args.optim``, over ``ept.parameter_groups`` if the adapter is EPT."""
        if self.optimizer is None and isinstance(self._adapter_config, EPTConfig):
            trained: Any = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
            groups = parameter_groups(
                trained,
                self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                kernel_lr_ratio=getattr(self.args, "kernel_lr_ratio", KERNEL_LR_RATIO),
                gate_lr_ratio=getattr(self.args, "gate_lr_ratio", GATE_LR_RATIO),
            )
            self.optimizer = optimizer_class(groups, **options)
        # Without an argument where there is none: transformers 5.0 takes no model.
        return super().create_optimizer() if model is None else super().create_optimizer(model)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The trainer's loss plus the method's weighted losses, with ``Trainer``'s rules for gradient accumulation.

        Every sample, or in a language model every answer token, of a step counts alike, however the step's batch is
        divided among accumulated batches and processes.
        """
        # Outputs only where they are asked for: TRL would make them in a second pass.
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        loss = found[0] if return_outputs else found
        # A loss over num_items_in_batch is a share of the accumulated batch's; a batch mean is yet to be divided.
        takes_items = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        is_share = takes_items and num_items_in_batch is not None
        if is_share and self._means_tokens:
            loss = loss * (inputs["labels"] != IGNORED).sum() / num_items_in_batch
        if self.model.training:
            accumulated = self.current_gradient_accumulation_steps
            self._note_loss("task_loss", loss if is_share else loss / accumulated)
            if self._adapter_config is not None:
                for name, (weight, value) in auxiliary_losses(self.model).items():
                    self._note_loss(name, value / accumulated)
                    loss = loss + weight * value / (accumulated if is_share else 1)
        return (loss, *found[1:]) if return_outputs else loss

    def _note_loss(self, name: str, value: Tensor) -> None:
        """A batch's part of one of the step's losses, for whoever logs them."""

    # ---- evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As in ``Trainer``, with the mean of the tasks' losses as ``<prefix>_loss``."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self._by_task and eval_dataset is None:
            losses = [metrics[f"{metric_key_prefix}_{name}_loss"] for name in self.eval_dataset]
            mean = {f"{metric_key_prefix}_loss": float(np.mean(losses))}
            self.log(mean)
            metrics |= mean
        return metrics
