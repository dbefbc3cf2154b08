"""Which task an unlabelled sample looks like: prototypes of the tasks among the model's token embeddings.

The decision is due before the first adapted layer runs, so it cannot use the inputs of the adapted layers, among which
the task embeddings are placed. The embedding layer's output exists by then. Its mean over a sample's tokens is the
representation z, frozen with the base model. A task's prototype is the mean z of its training samples, centred on the
mean of the tasks and divided by each coordinate's deviation: pooled token embeddings share a large common part, and a
few wide coordinates would otherwise decide (measured in ``docs/tasks.md``).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .mixture import TaskMixture
from .ranks import sum_over_ranks


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the tokens that ``mask`` keeps, in at least fp32. x ``[batch, sequence, d]`` -> ``[batch, d]``.

    A mask of another shape (windows, a decoder whose own is unknown) is ignored; a sample without tokens gives zeros.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if mask is None or mask.shape != x.shape[:2]:
        return x.mean(1, dtype=dtype)
    weights = mask.to(x.device, dtype).unsqueeze(-1)
    return (x.to(dtype) * weights).sum(1) / weights.sum(1).clamp_min(1)


def embedding_layer(model: nn.Module) -> nn.Module:
    """The layer that embeds the model's tokens.

    Raises:
        ValueError: there is none.
    """
    for module in model.modules():
        find = getattr(module, "get_input_embeddings", None)
        layer = find() if find is not None else None
        if layer is not None and getattr(layer, "weight", None) is not None and layer.weight.dim() == 2:
            return layer
    raise ValueError(
        f"auto_routing: {type(model).__name__} has no layer of token embeddings (get_input_embeddings), by which "
        "unlabelled samples are told apart"
    )


@torch.no_grad()
def input_representation(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """z of every sample of a call: ``[N, width]``, the mean embedding of the tokens that ``attention_mask`` keeps.

    Raises:
        ValueError: neither ``input_ids`` nor ``inputs_embeds`` among the call's arguments.
    """
    embedded = kwargs.get("inputs_embeds")
    if embedded is None:
        ids = kwargs.get("input_ids")
        ids = next((value for value in args if isinstance(value, Tensor)), None) if ids is None else ids
        if ids is None or ids.dim() != 2 or ids.is_floating_point():
            raise ValueError("auto_routing needs input_ids or inputs_embeds in the call, to tell the tasks apart")
        embedded = embedding_layer(model)(ids)
    return masked_mean(embedded, kwargs.get("attention_mask"))


class TaskPrototypes(nn.Module):
    """Running statistics of z for every task; saved with the adapter, and the same on every rank.

    Args:
        num_tasks: T. width: of an embedded token.

    Attributes:
        count ``[T]`` int64, mean and variance ``[T, width]``: of the samples of each task that were observed.
    """

    count: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(self, num_tasks: int, width: int, *, device: torch.device | None = None) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(num_tasks, dtype=torch.long, device=device))
        self.register_buffer("mean", torch.zeros(num_tasks, width, device=device))
        self.register_buffer("variance", torch.zeros(num_tasks, width, device=device))
        self._observed = False

    @torch.no_grad()
    def observe(self, z: Tensor, tasks: int | Tensor) -> None:
        """Add samples ``z [N, width]`` of the tasks ``int | [] | [N]``; sums over all ranks of a distributed run.

        A sample with a value that is not finite does not count: its step may be left out, this would stay.
        """
        if isinstance(tasks, int):
            tasks = torch.full((len(z),), tasks, device=z.device)
        tasks = tasks.expand(len(z))
        mean, variance = self.mean.float(), self.variance.float()
        finite = torch.isfinite(z).all(1, keepdim=True)
        members = F.one_hot(tasks, len(self.count)) * finite.float()  # [N, T]
        offset = z.float() - mean[tasks]  # from the mean so far: large common values do not cancel
        offset = offset.masked_fill(~finite, 0)
        sums = torch.cat([members.sum(0)[:, None], members.T @ offset, members.T @ offset.square()], dim=1)
        added, first, second = sum_over_ranks(sums).split([1, *[mean.shape[1]] * 2], dim=1)
        total = (self.count[:, None] + added).clamp_min(1)
        shift = first / total
        spread = (variance * self.count[:, None] + second) / total - shift.square()
        self.mean.copy_(mean + shift)
        self.variance.copy_(spread.clamp_min(0))
        self.count.add_(added[:, 0].long())
        self._observed = True

    @torch.no_grad()
    def mixture(self, z: Tensor, temperature: float) -> TaskMixture:
        """``softmax(cos(z, prototype) / temperature)`` of z ``[N, width]`` over the tasks that were observed.

        Raises:
            ValueError: no task was (seen without a host synchronisation once one has been).
        """
        self._check_observed()
        seen = self.count > 0
        share = seen.float()[:, None] / seen.sum().clamp_min(1)
        mean = self.mean.float()
        centre = (mean * share).sum(0)
        within = (self.variance.float() * share).sum(0)
        between = ((mean - centre).square() * share).sum(0)
        scale = (within + between).sqrt().clamp_min(1e-12)
        rows = F.normalize((z.float() - centre) / scale, dim=-1)
        prototypes = F.normalize((mean - centre) / scale, dim=-1)
        logits = (rows[:, None] * prototypes).sum(-1) / temperature  # [N, T]; not a product that autocast would round
        return TaskMixture(logits.masked_fill(~seen, float("-inf")).softmax(-1))

    def add_task(self) -> None:
        """Room for one more task, of which nothing has been observed."""
        for name, buffer in list(self.named_buffers()):
            setattr(self, name, torch.cat([buffer, torch.zeros_like(buffer[:1])]))

    def _check_observed(self) -> None:
        if self._observed or torch.compiler.is_compiling():
            return
        if not bool((self.count > 0).any()):
            raise ValueError(
                "task_ids='auto': no sample of any task has been observed yet; train with auto_routing=True, or call "
                "model.learn_auto_routing(batches)"
            )
        self._observed = True
