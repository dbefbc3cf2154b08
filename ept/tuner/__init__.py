"""EPT as a PEFT method."""

from .layer import EPTLinearLayer
from .model import EPTModel

__all__ = ["EPTLinearLayer", "EPTModel"]
