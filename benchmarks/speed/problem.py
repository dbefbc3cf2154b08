"""One point of the benchmark: a layer's shape, a mixed batch, and the tensors that every candidate is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import ept

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

#: (in, out) of the linear layers that EPT adapts.
SHAPES = {
    "t5-base.q": (768, 768),  # also k, v, o
    "t5-base.wi": (768, 3072),
    "t5-base.wo": (3072, 768),
    "llama2-7b.q": (4096, 4096),  # also k, v, o
    "llama2-7b.up": (4096, 11008),  # also gate
    "llama2-7b.down": (11008, 4096),
}

RANK = 8
ALPHA = 32
SCALES = (2, 4, 6, 8)
TOP_K = 2
#: A batch is cut into at least this many samples; a sample has one task.
MINIMUM_SAMPLES = 8


def shape_names(text: str) -> list[str]:
    """Shapes that ``text`` stands for: a name, a model ("t5-base": all of its layers), or INxOUT.

    Raises:
        ValueError: none of these.
    """
    if text in SHAPES:
        return [text]
    if family := [name for name in SHAPES if name.startswith(f"{text}.")]:
        return family
    parts = text.split("x")
    if len(parts) == 2 and all(part.isdigit() and int(part) > 0 for part in parts):
        return [text]
    models = sorted({name.split(".")[0] for name in SHAPES})
    raise ValueError(f"shapes must be out of {', '.join([*SHAPES, *models])} or INxOUT, got {text!r}")


def pyramid(experts: int) -> tuple[int, ...]:
    """Kernel sizes of so many experts, spread evenly over the scales 2, 4, 6, 8; 8 experts are the paper's pyramid."""
    return tuple(sorted(SCALES[expert % len(SCALES)] for expert in range(experts)))


def sample_count(tokens: int, tasks: int) -> int:
    """Samples of equal length that the tokens are cut into: the fewest that are at least 8 and hold every task.

    Raises:
        ValueError: fewer tokens than tasks.
    """
    if tokens < max(tasks, 1):
        raise ValueError(f"tokens must be at least the number of tasks ({tasks}), got {tokens}")
    least = min(max(tasks, MINIMUM_SAMPLES), tokens)
    return next(count for count in range(least, tokens + 1) if tokens % count == 0)


@dataclass(frozen=True)
class Point:
    """Where on the axes. dtype: of x, W and y; EPT's own parameters are fp32 beside any of them."""

    shape: str
    tokens: int
    tasks: int
    experts: int
    dtype: str

    @property
    def features(self) -> tuple[int, int]:
        """(in, out)."""
        if self.shape in SHAPES:
            return SHAPES[self.shape]
        width, height = self.shape.split("x")
        return int(width), int(height)


@dataclass(frozen=True)
class Problem:
    """The tensors of a point.

    Attributes:
        x: ``[samples, length, in]``, requires a gradient: inside a model a layer always passes one on.
        cotangent: ``[samples, length, out]``, the gradient of the output.
        base: the frozen linear, without bias, as in T5 and LLaMA.
        layer: an ``EPTLinear`` on the same weight; nothing about it is zero.
        task_of_sample: task id of each sample, every task present, in random order.
    """

    point: Point
    x: Tensor
    cotangent: Tensor
    base: nn.Linear
    layer: ept.EPTLinear
    task_of_sample: Sequence[int]

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def task_ids(self) -> Tensor | None:
        """As ``EPTLinear`` takes them; None where there is one task."""
        return None if self.point.tasks == 1 else torch.tensor(self.task_of_sample, device=self.device)

    def samples_of(self, task: int) -> Tensor:
        """Indices of the samples of a task."""
        return torch.tensor([i for i, t in enumerate(self.task_of_sample) if t == task], device=self.device)


def build(point: Point, device: torch.device, seed: int = 0) -> Problem:
    """Random tensors for a point.

    x is standard normal and W has variance 1 / in, so that outputs are of order one. The seed and the kernels are
    scaled so that the adapter's share of the output is too: an error in it shows.
    """
    generator = torch.Generator(device).manual_seed(seed)
    width, height = point.features
    dtype = DTYPES[point.dtype]

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return std * torch.randn(size, generator=generator, device=device)

    base = nn.Linear(width, height, bias=False, device=device, dtype=dtype).requires_grad_(False)
    base.weight.copy_(normal(height, width, std=width**-0.5))
    sizes = pyramid(point.experts)
    config = ept.EPTConfig(
        r=RANK, lora_alpha=ALPHA, kernel_sizes=sizes, top_k=min(TOP_K, len(sizes)), num_tasks=point.tasks
    )
    layer = ept.EPTLinear.from_linear(base, config).eval()
    with torch.no_grad():
        layer.A.copy_(normal(*layer.A.shape, std=width**-0.5))
        layer.B.copy_(normal(*layer.B.shape, std=RANK**-0.5))
        for kernel in layer.kernels:
            kernel.copy_(normal(*kernel.shape, std=kernel.shape[0] ** -0.5))
        layer.gate.copy_(normal(*layer.gate.shape, std=width**-0.5))
        layer.task_table.weight.copy_(normal(*layer.task_table.weight.shape))
    samples = sample_count(point.tokens, point.tasks)
    length = point.tokens // samples
    order = torch.randperm(samples, generator=generator, device=device).tolist()
    return Problem(
        point=point,
        x=normal(samples, length, width).to(dtype).requires_grad_(),
        cotangent=normal(samples, length, height).to(dtype),
        base=base,
        layer=layer,
        task_of_sample=[place % point.tasks for place in order],
    )
