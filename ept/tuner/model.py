"""``EPTModel``, the PEFT tuner of every method: puts adapters into a model, switches, merges and saves them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..adapted_linear import check_merged_task
from ..config import AdapterConfig, EPTConfig
from ..layer_adapter import WeightedLosses
from ..methods import METHODS, method_of
from ..readers import find_reader
from .calls import decoder_of
from .growth import GrowingTasks
from .layer import EPTLinearLayer
from .loading import check_adapter_state, loading_options
from .passes import NameResolver, TaskGenerate
from .quantised import watch_4bit_layers
from .structure import follow_rows, place_of, unfollow
from .targets import matching, module_names, target_features, tied_layers


class EPTModel(GrowingTasks):
    """Expert Pyramid Tuning around a model; made by ``peft.get_peft_model(model, EPTConfig(...))``.

    ``model(**batch, task_ids=...)`` and ``model.generate(..., task_ids=...)`` take an id or a name for the whole batch,
    or one for each sample (a list or a tensor ``[batch]``) or token (``[batch, sequence]``, for packed samples); "auto"
    leaves it to the input (``auto_routing``). With one task, or a method that treats all alike, they may be left out.
    A layer that cannot tell which rows belong to which id refuses a batch of several tasks (``docs/rows.md``).

    ``ept_task_tables`` holds, for every adapter, its tasks and what its layers share (a ``TaskSet``).
    """

    uses_shared_state = True
    prefix = "ept_"
    tuner_layer_cls = EPTLinearLayer
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.copy()

    # ---- injection

    def _pre_injection_hook(self, model: nn.Module, config: AdapterConfig, adapter_name: str) -> None:
        self.ept_task_tables = nn.ModuleDict()
        self._trained = None
        self._items = None
        self._passes = 0
        self.recipe_missing = {"ept.auxiliary_loss", "ept.parameter_groups"} if isinstance(config, EPTConfig) else set()
        self._merged = ()
        self._unknown = []
        self._hooks: list[RemovableHandle] = []

    def _post_injection_hook(self, model: Any, config: AdapterConfig, adapter_name: str) -> None:
        self._hooks += [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave, always_call=True),
            *watch_4bit_layers(model),
        ]
        if (decoder := decoder_of(model)) is not None:
            self._hooks.append(decoder.register_forward_pre_hook(self._enter_decoder, with_kwargs=True))
        if hasattr(model, "generate"):
            model.generate = TaskGenerate(model, self)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As in PEFT; the tables of other adapters keep their ``requires_grad``."""
        before = [(parameter, parameter.requires_grad) for parameter in self.ept_task_tables.parameters()]
        self._injected = adapter_name  # several adapters may be of one config object
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        for parameter, requires_grad in before:
            parameter.requires_grad = requires_grad
        self._hooks += follow_rows(model, EPTLinearLayer)
        self._find_unknown()

    def _prepare_adapter_config(self, peft_config: AdapterConfig, model_config: dict[str, Any]) -> AdapterConfig:
        by_default = peft_config.target_modules is None
        config: Any = super()._prepare_adapter_config(peft_config, model_config)
        if by_default and not isinstance(config.target_modules, str):
            # Some architectures' defaults are names of several models; one that this model lacks is no mistake.
            found = matching(config.target_modules, module_names(self.model))
            config.target_modules = found or config.target_modules
        return config

    def _prepare_model(self, peft_config: AdapterConfig, model: nn.Module) -> None:
        """Called before PEFT changes the model: check the targets, make what the adapter's layers share."""
        adapter_name = self._injected
        features = target_features(model, peft_config)
        self._tied = tied_layers(model, features)
        weight = next((p for p in model.parameters() if p.is_floating_point()), None)
        device = weight.device if weight is not None else None
        dtype = torch.promote_types(weight.dtype, torch.float32) if weight is not None else None
        shared = method_of(peft_config).adapter.make_shared(peft_config, features, device=device, dtype=dtype)
        if getattr(peft_config, "auto_routing", False):
            shared.prototypes = self._new_prototypes(shared)
        self.ept_task_tables[adapter_name] = shared.requires_grad_(
            not peft_config.inference_mode and adapter_name in self.active_adapters
        )

    def became_part(self, parent: nn.Module, name: str) -> None:
        """Let a ``PeftModel`` resolve names of tasks before its forward pass, which may be compiled, begins."""
        if isinstance(parent, PeftModel):
            parent.register_forward_pre_hook(NameResolver(self), with_kwargs=True)

    def _create_and_replace(
        self,
        peft_config: AdapterConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        if isinstance(target, EPTLinearLayer):
            layer = target
        else:
            layer = EPTLinearLayer(target)
            layer.train(target.training)
            layer.set_adapter(self.active_adapters)
            layer.tied_to = self._tied.get(current_key)
            reader = find_reader(self.model, current_key)
            layer.read_by = None if reader is None else reader[0]
        shared = self.ept_task_tables[adapter_name]
        layer.update_layer(adapter_name, peft_config, shared, current_key, inference_mode=peft_config.inference_mode)
        declared = peft_config.layout_of(current_key)
        layer.ept_adapters[adapter_name].row_place = place_of(self.model, current_key, declared)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """An adapter is made in fp32 or wider; without autocast its parameters take the dtypes of what they adapt."""
        if autocast_adapter_dtype:
            return
        weight = next((p for p in self.model.parameters() if p.is_floating_point()), None)
        parts = [(self.ept_task_tables[adapter_name], weight)]
        for layer, adapter in self.adapters(adapter_name).items():
            base: Any = self.model.get_submodule(layer)
            parts.append((adapter, getattr(base.get_base_layer(), "weight", None)))
        for part, like in parts:
            if like is not None and like.dtype in (torch.bfloat16, torch.float16):
                for parameter in part.parameters():
                    parameter.data = parameter.data.to(like.dtype)

    # ---- losses

    def auxiliary_losses(self) -> WeightedLosses:
        """The method's own losses of the last training forward, with their weights. See ``ept.auxiliary_losses``."""
        self.recipe_missing.discard("ept.auxiliary_loss")
        name = self.active_adapters[0]
        config, shared, adapters = self.peft_config[name], self.ept_task_tables[name], self.adapters(name)
        weights = [option for option in ("contrastive_weight", "orthogonality_weight") if getattr(config, option, 0)]
        parameters = (parameter for part in (shared, *adapters.values()) for parameter in part.parameters())
        if weights and any(parameter.dim() < 2 for parameter in parameters):  # every one is a matrix, or more
            raise ValueError(
                f"{weights[0]} is {getattr(config, weights[0])}, but FSDP1 shards this model and has whole parameters "
                "inside its forward pass alone: use FSDP2, or set the weight to 0"
            )
        return method_of(config).adapter.losses(config, shared, adapters, self._trained)

    # ---- adapters by name

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        self.train_tables([] if inference_mode else names)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self.train_tables(self.active_adapters if enabled else [])  # as PEFT does with the layers

    def train(self, mode: bool = True) -> EPTModel:
        """As in ``nn.Module``; what finished tasks use stays frozen."""
        super().train(mode)
        if mode:
            self.freeze_finished()
        return self

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        del self.ept_task_tables[adapter_name]
        self._find_unknown()
        self.train_tables(self._trainable())

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        self.train_tables(self._trainable())

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        names = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        tables = self.ept_task_tables.items()
        training = {name for name, shared in tables if any(p.requires_grad for p in shared.parameters())}
        self.train_tables(training | names if requires_grad else training - names)

    def _trainable(self) -> list[str]:
        return [name for name in self._active() if not self.peft_config[name].inference_mode]

    # ---- merging

    def _tuner_layers(self) -> list[Any]:
        """The adapted layers, and those that PEFT makes itself: trained rows of an embedding, which know no tasks."""
        return [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False, *, task: int | str | None = None
    ) -> None:
        """Put one task's updates into the base weights; ``unmerge_adapter`` restores them, bit-identical.

        Adapters may be merged one after the other, for the same task. One that is merged already is passed over with a
        warning.

        Args:
            adapter_names: default: the active ones.
            task: id or name; None where there is one task, or one is merged.

        Raises:
            ValueError: a method that does not merge, no task given with more than one, an unknown task, another one
                than is merged, a weight that is computed at every call or shared with another module, or a result that
                is not finite; no weight has changed then.
        """
        self._check_merge_allowed()
        names = self.active_adapters if adapter_names is None else adapter_names
        for name in names:
            self.check_mergeable(name)
        merged = self.merged_task
        task = merged if task is None else task
        tasks = [self.ept_task_tables[name].resolve(task) for name in names if name in self.ept_task_tables]
        if not tasks or not isinstance(tasks[0], int):
            raise ValueError(f"task must be one id or name for an adapter among {list(self.peft_config)}, got {task!r}")
        if len(set(tasks)) > 1:
            raise ValueError(f"task={task!r} means different tasks to the adapters {list(names)}; give an id")
        if merged not in (None, tasks[0]):
            raise ValueError(f"task={task!r}, but task {merged} is already merged; call unmerge_adapter first")
        layers = self._tuner_layers()
        before = [list(layer.merged_adapters) for layer in layers]
        try:
            for layer in layers:
                _merge_layer(layer, adapter_names, tasks[0], safe_merge)
        except BaseException:  # Ctrl-C as well: half a merged model would answer for another task
            for layer, had in zip(layers, before, strict=True):
                if layer.merged_adapters != had:
                    layer.unmerge()
                    if had:
                        _merge_layer(layer, had, merged)
            raise
        self._merged = tuple(layer for layer in layers if isinstance(layer, EPTLinearLayer) and layer.merged)[:1]

    def check_mergeable(self, adapter_name: str) -> None:
        """Raise ValueError where a task of an adapter cannot be put into the weights exactly, naming the layer."""
        adapters = self.adapters(adapter_name)
        tied = tied_layers(self.model, adapters)
        for layer, adapter in adapters.items():
            adapter.check_mergeable()
            module: Any = self.model.get_submodule(layer)
            module.tied_to = tied.get(layer)
            module.check_own_weight(layer)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        *,
        task: int | str | None = None,
    ) -> nn.Module:
        """The base model with one task's updates in its weights and no trace of the adapter.

        What is merged already stays so, as in PEFT.

        Raises:
            ValueError: as ``merge_adapter``.
        """
        merged = {name for module in self._tuner_layers() for name in module.merged_adapters}
        names = self.active_adapters if adapter_names is None else adapter_names
        if self.merged_task is not None and task is not None and self.routes_by_task:
            check_merged_task(self.ept_task_tables[self.active_adapters[0]].resolve(task), self.merged_task)
        if not merged or not merged.issuperset(names):
            self.merge_adapter([name for name in names if name not in merged], safe_merge, task=task)
        return self._unload_and_optionally_merge(merge=False, progressbar=progressbar)

    def unload(self) -> nn.Module:
        """The base model as it was, without adapters."""
        if self.merged_task is not None:
            self.unmerge_adapter()
        return super().unload()

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's version wants every trained module to have a weight, and sets the weight of a layer that is put back
        # to itself, which a parametrisation cannot, or stores in other numbers.
        if isinstance(child, AuxiliaryTrainingWrapper) or new_module is getattr(child, "base_layer", None):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model: Any = super()._unload_and_optionally_merge(*args, **kwargs)
        for hook in self._hooks:
            hook.remove()
        unfollow(model)
        model.__dict__.pop("generate", None)
        return model

    # ---- saved adapters

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        for container in ("ept_adapters", "ept_task_tables"):
            key = key.replace(f"{container}.{adapter_name}.", f"{container}.")
        return key

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: AdapterConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        marker = f".{adapter_name}."
        expected = {
            key: tensor
            for key, tensor in model.state_dict().items()
            if any(part + marker in key for part in (".ept_adapters", "ept_task_tables", ".modules_to_save"))
        }
        whole, ignores_sizes = loading_options()
        check_adapter_state(expected, remapped, partial=not whole, ignore_sizes=ignores_sizes)
        ept_model(model).freeze_finished()  # of modules that are saved with the adapter, too: they are there only now
        return remapped


def _merge_layer(layer: Any, names: list[str] | None, task: int | None, safe_merge: bool = False) -> None:
    if isinstance(layer, EPTLinearLayer):
        layer.merge(safe_merge, names, task=task)
    else:
        layer.merge(safe_merge, names)


def ept_model(model: nn.Module) -> EPTModel:
    """The tuner of one of this package's methods inside ``model``.

    Raises:
        ValueError: there is none.
    """
    candidates = (model, getattr(model, "base_model", None), getattr(model, "module", None))
    for candidate in candidates:
        if isinstance(candidate, PeftModel):
            candidate = candidate.base_model
        if isinstance(candidate, EPTModel):
            return candidate
    raise ValueError(f"model must be a PeftModel with an EPT adapter, got {type(model).__name__}")


def register() -> None:
    """Add every method to PEFT's tables: importing ``ept`` is all that a saved adapter needs. Safe to call twice."""
    # Declared as keyed by members of PEFT's own enumeration; their names are strings too (``TaskRoutedPeftType``).
    configs: Any = PEFT_TYPE_TO_CONFIG_MAPPING
    tuners: Any = PEFT_TYPE_TO_TUNER_MAPPING
    prefixes: Any = PEFT_TYPE_TO_PREFIX_MAPPING
    for method in METHODS:
        configs[method.peft_type] = method.config
        tuners[method.peft_type] = EPTModel
        prefixes[method.peft_type] = EPTModel.prefix
