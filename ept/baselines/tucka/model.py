"""The PEFT tuner: injects TuckA layers, gives their forward pass one route, merges a fixed one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from ept.context import TaskContext, activate, checkpoint_with_tasks, current, pop, push
from ept.tuner.checkpoint import check_adapter_state
from ept.tuner.forward import takes_task_ids
from ept.tuner.targets import target_features

from .config import TuckAConfig
from .layer import NO_ROUTE, TuckALayer
from .router import CentroidRouter


class RoutedGenerate:
    """``generate`` of an adapted model: one route for all its forward passes, that of its prompt.

    An object, not a closure, so that ``copy.deepcopy`` of the model rebinds it to the copy.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, task_ids: Any = None, **kwargs: Any) -> Any:
        outer = current()
        if task_ids is None and outer is not None:
            task_ids = outer.task_ids
        # The mask is for an encoder, which generation calls by itself.
        with activate(TaskContext(task_ids, kwargs.get("attention_mask"), expands=True)):
            return type(self.model).generate(self.model, *args, **kwargs)


class TuckAModel(BaseTuner):
    """TuckA around a model; made by ``peft.get_peft_model(model, TuckAConfig(...))``.

    One router an adapter, in the first adapted layer of a forward pass, decides for the batch; it leaves padding out of
    account where the call has an ``attention_mask [batch, sequence]``. Before its first training batch it has no
    centroids, and the model computes what its base does.

    ``task_ids`` are accepted and passed on to a base model that wants them (for its heads); the adapter has no tasks.
    """

    uses_shared_state = True
    prefix = "tucka_"
    tuner_layer_cls = TuckALayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.copy()

    # ---- injection

    def _pre_injection_hook(self, model: nn.Module, config: TuckAConfig, adapter_name: str) -> None:
        self.tucka_routers = nn.ModuleDict()
        self._routing_module: dict[str, str] = {}

    def _post_injection_hook(self, model: nn.Module, config: TuckAConfig, adapter_name: str) -> None:
        self._hooks = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave, always_call=True),
        ]
        if hasattr(model, "generate"):
            model.generate = RoutedGenerate(model)

    def _prepare_model(self, peft_config: TuckAConfig, model: nn.Module) -> None:
        """Last stop before PEFT changes the model: check the targets, settle which one routes, make its router."""
        (adapter_name,) = (name for name, config in self.peft_config.items() if config is peft_config)
        features = target_features(model, peft_config)
        name = routing_module(list(features), peft_config.router_module)
        target = model.get_submodule(name)
        parameter = next((p for p in target.parameters() if p.is_floating_point()), None)
        router = CentroidRouter(
            features[name][0],
            peft_config.num_groups,
            peft_config.group_size,
            peft_config.centroid_noise,
            device=None if parameter is None else parameter.device,
            dtype=None if parameter is None else torch.promote_types(parameter.dtype, torch.float32),
        )
        self._routing_module[adapter_name] = name
        self.tucka_routers[adapter_name] = router.train(target.training)
        self._set_router_gradients()

    def _create_and_replace(
        self,
        peft_config: TuckAConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        layer = target
        if not isinstance(target, TuckALayer):
            layer = TuckALayer(target, current_key)
            layer.train(target.training)
            layer.set_adapter(self.active_adapters)
        layer.update_layer(
            adapter_name,
            peft_config,
            self.tucka_routers[adapter_name],
            routes=current_key == self._routing_module[adapter_name],
            inference_mode=peft_config.inference_mode,
        )
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    # ---- a forward pass

    def _layers(self) -> Iterator[TuckALayer]:
        return (module for module in self.model.modules() if isinstance(module, TuckALayer))

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Forward pre-hook of the wrapped model: open a pass, for whose layers the first one will route."""
        layer = next(self._layers(), None)  # all are merged, and all are disabled, together
        if layer is not None and layer.merged and layer.disable_adapters:
            self.unmerge_adapter()
        outer = None if torch.compiler.is_compiling() else current()  # Dynamo cannot read a context variable
        task_ids = kwargs.pop("task_ids", None if outer is None else outer.task_ids)
        context = TaskContext(task_ids, kwargs.get("attention_mask"), owner=module)
        if outer is not None and outer.expands:
            context.shared = outer.shared
        if self.training:
            checkpoint_with_tasks(module)
        push(context)
        if takes_task_ids(module):
            kwargs["task_ids"] = task_ids
        return args, kwargs

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        context = current()
        if context is not None and context.owner is module:  # not so where _enter refused the call
            pop(context)

    # ---- adapters by name

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        for name, router in self.tucka_routers.items():
            router.requires_grad_(name in names and not inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        del self.tucka_routers[adapter_name]
        self._set_router_gradients()

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        self._set_router_gradients()

    def _set_router_gradients(self) -> None:
        for name, router in self.tucka_routers.items():
            router.requires_grad_(name in self.active_adapters and not self.peft_config[name].inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in names:
            if name in self.tucka_routers:
                self.tucka_routers[name].requires_grad_(requires_grad)

    # ---- merging

    def merge_adapter(
        self,
        adapter_names: list[str] | None = None,
        safe_merge: bool = False,
        *,
        task: int | str | None = None,
        group: int | None = None,
        weights: Sequence[float] | Tensor | None = None,
    ) -> None:
        """Put the updates of one fixed route into the base weights; ``unmerge_adapter`` takes them out to the bit.

        The merged model routes no longer: every batch is treated as if the router had chosen ``group`` and ``weights``.

        Raises:
            ValueError: no route, or a task instead of one; already merged, or a result that is not finite. No weight
                has changed then.
        """
        if task is not None or group is None or weights is None:
            raise ValueError(NO_ROUTE)
        self._check_merge_allowed()
        if any(layer.merged for layer in self._layers()):
            raise ValueError("an adapter is already merged; call unmerge_adapter first")
        try:
            for layer in self._layers():
                layer.merge(safe_merge, adapter_names, group=group, weights=weights)
        except Exception:
            self.unmerge_adapter()
            raise

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        **route: Any,
    ) -> nn.Module:
        """The base model with one fixed route's updates in its weights and no trace of TuckA.

        Raises:
            ValueError: as ``merge_adapter``.
        """
        if route or not any(layer.merged for layer in self._layers()):
            self.merge_adapter(adapter_names, safe_merge, **route)
        return self._unload_and_optionally_merge(merge=False, progressbar=progressbar)

    def unload(self) -> nn.Module:
        """The base model as it was, without adapters."""
        self.unmerge_adapter()
        return super().unload()

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        for hook in self._hooks:
            hook.remove()
        model.__dict__.pop("generate", None)
        return model

    # ---- checkpoints

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        for container in ("tucka_adapters", "tucka_routers"):
            key = key.replace(f"{container}.{adapter_name}.", f"{container}.")
        return key

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: TuckAConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        marker = f".{adapter_name}."
        expected = {
            key: tensor
            for key, tensor in model.state_dict().items()
            if (".tucka_adapters" + marker) in key or ("tucka_routers" + marker) in key
        }
        check_adapter_state(expected, remapped)
        return remapped


def routing_module(names: Sequence[str], wanted: str | None) -> str:
    """Which of the adapted modules routes: the first, or the one that ``wanted`` names or ends.

    Raises:
        ValueError: none or several match ``wanted``.
    """
    if wanted is None:
        return names[0]
    matches = [name for name in names if name == wanted or name.endswith(f".{wanted}")]
    if len(matches) != 1:
        raise ValueError(
            f"router_module must name one adapted module, got {wanted!r}, which {len(matches)} of them match; "
            f"the first ones are {', '.join(names[:4])}"
        )
    return matches[0]


def tucka_model(model: nn.Module) -> TuckAModel:
    """The TuckA tuner inside ``model``.

    Raises:
        ValueError: there is none.
    """
    for candidate in (model, getattr(model, "base_model", None), getattr(model, "module", None)):
        found = candidate.base_model if isinstance(candidate, PeftModel) else candidate
        if isinstance(found, TuckAModel):
            return found
    raise ValueError(f"model must be a PeftModel with a TuckA adapter, got {type(model).__name__}")


def group_load(model: nn.Module, adapter_name: str | None = None) -> Tensor:
    """How often each group was chosen since the model was made: ``[K]`` int64, on the router's device.

    Counted there without a host synchronisation; reading the result is one.
    """
    tuner = tucka_model(model)
    return tuner.tucka_routers[adapter_name or tuner.active_adapters[0]].group_load.clone()
