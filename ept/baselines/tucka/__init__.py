"""TuckA: hierarchical Tucker experts on the input side of a frozen linear (arXiv 2511.06859).

Importing makes PEFT know it.
"""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from .adapter import TuckerAdapter
from .config import TUCKA, TuckAConfig
from .model import TuckAModel, group_load
from .route import Route, fixed_route
from .router import CentroidRouter

__all__ = ["CentroidRouter", "Route", "TuckAConfig", "TuckAModel", "TuckerAdapter", "fixed_route", "group_load"]

PEFT_TYPE_TO_CONFIG_MAPPING[TUCKA] = TuckAConfig
PEFT_TYPE_TO_TUNER_MAPPING[TUCKA] = TuckAModel
PEFT_TYPE_TO_PREFIX_MAPPING[TUCKA] = TuckAModel.prefix
