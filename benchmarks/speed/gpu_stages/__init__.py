"""The stages of ``gpu.py``, in order of worth. Each module has ``run(bench)`` and says what it measures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A process of its own.

    Attributes:
        name: its module in this package.
        seconds: what it may take of 8 minutes; a share of what is left otherwise.
        title: for the table.
        interprets: in a dry run it runs Triton's kernels too, in the interpreter.
        beside: it needs the CPUs alone, and runs beside the stage after it.
    """

    name: str
    seconds: float
    title: str
    interprets: bool = False
    beside: bool = False


STAGES = (
    Stage("build", 75, "CUDA library built by nvcc", beside=True),
    Stage("machine", 40, "versions, properties, copy and cuBLAS ceilings"),
    Stage("gate", 80, "accuracy, poisoned memory, determinism, graph capture", interprets=True),
    Stage("layers", 90, "a layer beside its frozen linear and LoRA"),
    Stage("kernels", 60, "each kernel and product alone", interprets=True),
    Stage("steps", 75, "training steps of LLaMA blocks and T5-base"),
    Stage("tune", 50, "configurations of the single pass (plan fused)", interprets=True),
    Stage("counters", 45, "ncu on the three largest kernels"),
    Stage("sanitize", 30, "compute-sanitizer on small cases"),
)
