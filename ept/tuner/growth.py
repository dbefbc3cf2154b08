"""Tasks that are added to a trained adapter, and what then stays frozen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper

from ept_kernels.geometry import check_kernel_sizes

from ..tasks import AUTO
from .passes import TaskPasses


class GrowingTasks(TaskPasses):
    """A tuner whose adapters may get more tasks."""

    def add_task(
        self,
        name: str | None = None,
        *,
        like: int | str | None = None,
        new_kernels: Sequence[int] = (),
        adapter_name: str | None = None,
    ) -> int:
        """Add a task to a trained EPT adapter. Only its own parameters train; no other task's output changes.

        Its own are an embedding and, with ``new_kernels``, experts in every layer. Seed, kernels, gates and the other
        tasks' embeddings are frozen, and stay so when the adapter is saved and loaded (``config.finished_tasks``). So
        are other modules that train with the adapter (``modules_to_save``), except a head of the new task's own
        (``ept.training.add_task`` makes one). Make the optimizer afterwards: an earlier one lacks the embedding.

        Args:
            name: of the task, where the adapter names its tasks; None where it does not.
            like: the task whose embedding it starts from. None: the mean of all.
            new_kernels: kernel sizes of experts that this task and later ones may use beside the others, in every
                layer. Every layer must have their scales, since the seed is cut for these. They begin at zero with at
                least half of the task's weight, so only the embedding starts at ``like``, not the output.
            adapter_name: default: the active one.

        Returns:
            The new task's id.

        Raises:
            ValueError: not an EPT adapter, a merged one, a name that is taken, missing, "auto" or needless, an unknown
                task ``like``, a scale that a layer lacks, a model with a head for every task, or several active
                adapters and none named; nothing has changed then.
        """
        if hasattr(self.model, "add_task"):
            raise ValueError(
                f"add_task: the model ({type(self.model).__name__}) has a part of its own for every task; "
                "ept.training.add_task(model, spec) adds both"
            )
        return self.append_task(name, like, new_kernels, adapter_name)

    def append_task(
        self, name: str | None, like: int | str | None, new_kernels: Sequence[int], adapter_name: str | None = None
    ) -> int:
        """``add_task`` to the adapter alone; the caller adds the model's own part."""
        if adapter_name is None and len(self.active_adapters) > 1:
            raise ValueError(f"adapter_name must name one of the active adapters {self.active_adapters}, got None")
        adapter_name = adapter_name or self.active_adapters[0]
        if adapter_name not in self.peft_config:
            raise ValueError(f"adapter_name must be one of {list(self.peft_config)}, got {adapter_name!r}")
        config, shared = self.peft_config[adapter_name], self.ept_task_tables[adapter_name]
        if not hasattr(config, "finished_tasks"):
            raise ValueError(f"add_task is not supported by {config.peft_type}")
        if not shared.routes:
            raise ValueError("add_task: with routing='token' there is no task table to add to; every task is served")
        if self.merged_task is not None:
            raise ValueError(f"add_task: task {self.merged_task} is merged into the weights; unmerge it first")
        names = config.task_names
        if names is None and name is not None:
            raise ValueError(f"name must be None, since the adapter's tasks have no names, got {name!r}")
        if names is not None and (not isinstance(name, str) or name in ("", AUTO, *names)):
            raise ValueError(f'name must be a new name, none of "", "auto", {", ".join(names)}; got {name!r}')
        try:
            start = None if like is None else shared.resolve(like)
        except (TypeError, ValueError) as error:
            raise ValueError(f"like={like!r} must be None or one of the tasks: {error}") from None
        if not (start is None or isinstance(start, int)):
            raise ValueError(f"like must be one id or name, got {like!r}")
        layers: Any = self.adapters(adapter_name)  # pyramids, as ``finished_tasks`` shows
        try:
            sizes = check_kernel_sizes(new_kernels) if new_kernels != () else ()
        except ValueError as error:
            raise ValueError(f"new_kernels={new_kernels!r} must hold kernel sizes: {error}") from None
        for layer, adapter in layers.items():
            try:
                adapter.check_scales(sizes)
            except ValueError as error:
                raise ValueError(f"new_kernels={new_kernels!r} does not fit layer {layer!r}: {error}") from None
        finished = shared.num_tasks
        task = shared.add_task(name, start)
        config = self._own_config(adapter_name)
        config.num_tasks, config.finished_tasks = finished + 1, finished
        if names is not None:
            config.task_names = [*names, name]
        trains = adapter_name in self.active_adapters and not config.inference_mode
        if sizes:
            config.added_kernels = (*(config.added_kernels or ()), (task, sizes))
            for adapter in layers.values():
                adapter.add_experts(task, sizes)
                if not trains:
                    adapter.requires_grad_(False)
        shared.requires_grad_(trains)
        self.freeze_finished()
        return task

    def freeze_finished(self) -> None:
        """Freeze what finished tasks use, which PEFT makes trainable when it loads or activates an adapter.

        Called after that, and when training begins (``train()``, ``ept.parameter_groups``). A module to save that has
        parts for every task has a method ``finish(count)`` that freezes those of the first ``count``.
        """
        counts = {name: getattr(config, "finished_tasks", 0) for name, config in self.peft_config.items()}
        for name, count in counts.items():
            if not count:
                continue
            table: Any = self.ept_task_tables[name]
            table.freeze_finished_rows()
            pyramids: Any = self.adapters(name).values()
            for adapter in pyramids:
                adapter.finish(count)
            if self.peft_config[name].bias != "none":
                for path, parameter in self.model.named_parameters():
                    if path.endswith("bias") and not any(part in path for part in (".modules_to_save.", ".ept_")):
                        parameter.requires_grad_(False).grad = None
            for wrapper in self.model.modules():
                if isinstance(wrapper, TrainableTokensWrapper):
                    rows: Any = wrapper.token_adapter.trainable_tokens_delta
                    if name in rows:
                        rows[name].requires_grad_(False).grad = None
                if not isinstance(wrapper, ModulesToSaveWrapper) or name not in wrapper.modules_to_save:
                    continue
                saved: Any = wrapper.modules_to_save[name]
                if hasattr(saved, "finish"):
                    saved.finish(count)
                else:
                    saved.requires_grad_(False).zero_grad()

    def train_tables(self, names: Iterable[str]) -> None:
        """Make the shared tables of these adapters trainable, and those of no others; finished tasks stay frozen."""
        trained = set(names)
        for name, shared in self.ept_task_tables.items():
            shared.requires_grad_(name in trained)
        self.freeze_finished()
