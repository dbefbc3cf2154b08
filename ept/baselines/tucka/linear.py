"""``TuckALinear``: a drop-in for ``nn.Linear`` with TuckA's update of its input."""

from __future__ import annotations

from ept.adapted_linear import AdaptedLinear

from .adapter import TuckerAdapter


class TuckALinear(AdaptedLinear, TuckerAdapter):
    """``y = (x + alpha x U M U^T) W0^T + b`` with W0 and b frozen (arXiv 2511.06859).

    By itself a layer has a router of its own and routes each call. Layers that share one (``shared``, the first one's
    ``routing``) and are called inside one ``ept.use_tasks`` block route once, by the input of the first called.
    """

    own_name = "routing"
