"""Every method that the tuner can inject: its config and what it adds to a layer, by the name PEFT knows it by."""

from __future__ import annotations

from dataclasses import dataclass

from .baselines.dcft import DCFT, DCFTAdapter, DCFTConfig
from .baselines.mixlora import MIXLORA, MixLoRAAdapter, MixLoRAConfig
from .baselines.moelora import MOELORA, MOELoRAAdapter, MOELoRAConfig
from .baselines.more import MORE, MoREAdapter, MoREConfig
from .baselines.tucka.adapter import TUCKA, TuckAConfig, TuckerAdapter
from .config import EPT, AdapterConfig, EPTConfig
from .layer_adapter import LayerAdapter
from .pyramid.adapter import PyramidAdapter


@dataclass(frozen=True)
class Method:
    """A method: ``peft_type`` of its configs, their class, and the adapter that each layer gets."""

    peft_type: str
    config: type[AdapterConfig]
    adapter: type[LayerAdapter]


METHODS: tuple[Method, ...] = (
    Method(EPT, EPTConfig, PyramidAdapter),
    Method(MORE, MoREConfig, MoREAdapter),
    Method(MOELORA, MOELoRAConfig, MOELoRAAdapter),
    Method(MIXLORA, MixLoRAConfig, MixLoRAAdapter),
    Method(DCFT, DCFTConfig, DCFTAdapter),
    Method(TUCKA, TuckAConfig, TuckerAdapter),
)

_BY_CONFIG = {method.config: method for method in METHODS}


def method_of(config: AdapterConfig) -> Method:
    """The method that ``config`` configures.

    Raises:
        TypeError: not a config of one of ``METHODS``.
    """
    for config_class in type(config).__mro__:
        if config_class in _BY_CONFIG:
            return _BY_CONFIG[config_class]
    allowed = ", ".join(method.config.__name__ for method in METHODS)
    raise TypeError(f"config must be one of {allowed}, got {type(config).__name__}")
