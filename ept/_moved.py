"""Old import paths of this package, see ``ept_kernels._moved``."""

from __future__ import annotations

#: Old module -> the modules where its names are now, asked in this order. Modules that are still there have lost some.
MOVED: dict[str, tuple[str, ...]] = {
    "ept.adapter": ("ept.pyramid.adapter",),
    "ept.adapter_config": ("ept.config",),
    "ept.auxiliary": ("ept.losses",),
    "ept.baselines.ffn_blocks": ("ept.baselines.mixlora_router",),
    "ept.baselines.tucka.centroids": ("ept.baselines.tucka.router",),
    "ept.baselines.tucka.config": ("ept.baselines.tucka.adapter",),
    "ept.baselines.tucka.linear": ("ept.baselines.tucka.adapter",),
    "ept.baselines.tucka.route": ("ept.baselines.tucka.router",),
    "ept.baselines.tucka.routes": ("ept.introspection",),
    "ept.baselines.tucka.shared": ("ept.baselines.tucka.adapter",),
    "ept.context": ("ept.recompute",),
    "ept.contrastive_config": ("ept.config",),
    "ept.following": ("ept.rows", "ept.tuner.structure"),
    "ept.growing": ("ept.task_table",),
    "ept.linear": ("ept.pyramid.linear",),
    "ept.merging": ("ept.adapted_linear",),
    "ept.optim": ("ept.pyramid.optim",),
    "ept.peft_type": ("ept.config",),
    "ept.pyramids": ("ept.config",),
    "ept.registration": ("ept.adapted_linear",),
    "ept.router": ("ept.pyramid.router",),
    "ept.rows": ("ept.context",),
    "ept.task_routed": ("ept.task_table",),
    "ept.tasks": ("ept.task_table",),
    "ept.token_routing": ("ept.pyramid.router",),
    "ept.transforms": ("ept.adapted_linear",),
    "ept.tuner.alone": ("ept.tuner.structure",),
    "ept.tuner.checkpoint": ("ept.tuner.loading",),
    "ept.tuner.dense": ("ept.tuner.quantised",),
    "ept.tuner.forward": ("ept.tuner.calls", "ept.tuner.passes"),
    "ept.tuner.packing": ("ept.tuner.calls",),
    "ept.widths": ("ept.task_table",),
}
