"""In models that nobody knows, rows that are as many as the ids by accident are no samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import get_peft_model
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode

import ept

BATCH, WIDTH, IDS = 4, 16, [2, 0, 1, 0]


class Net(nn.Module):
    """Token embeddings and two layers; subclasses say between which of them rows move."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, WIDTH)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.between(self.first(self.embed(input_ids)), input_ids)

    def between(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.second(x)


class Masked(Net):
    def between(self, x: Tensor, ids: Tensor) -> Tensor:
        chosen = ids < 20
        result = torch.zeros_like(x)
        result[chosen] = self.second(F.gelu(F.layer_norm(x[chosen], (WIDTH,))))
        return result


class Indexed(Net):
    def between(self, x: Tensor, ids: Tensor) -> Tensor:
        chosen = (ids < 20).flatten().nonzero()[:, 0]
        rows = self.second(x.flatten(0, 1).index_select(0, chosen))
        return torch.zeros_like(x).flatten(0, 1).index_add(0, chosen, rows).view_as(x)


class Sorted(Net):
    def between(self, x: Tensor, ids: Tensor) -> Tensor:
        order = ids[:, 0].argsort()
        return self.second(x.mean(1)[order])[order.argsort()]


class TimeFirst(Net):
    def between(self, x: Tensor, ids: Tensor) -> Tensor:
        batch, time = ids.shape
        frames = x[:, :, None].expand(-1, -1, 3, -1).transpose(0, 1).reshape(time, batch * 3, WIDTH)
        return self.second(frames).view(time, batch, 3, WIDTH).transpose(0, 1)


class SlotsFirst(Net):
    """As many slots as samples, whose contents are sums over the tokens."""

    def between(self, x: Tensor, ids: Tensor) -> Tensor:
        weights = x[..., :4].softmax(-1)
        slots = torch.einsum("bse,bsd->ebd", weights, x).repeat_interleave(2, 1)
        return torch.einsum("bse,ebd->bsd", weights, self.second(slots)[:, ::2])


class SampleBySample(Net):
    def between(self, x: Tensor, ids: Tensor) -> Tensor:
        return torch.stack([self.second(sample) for sample in x])


class Attention(Net):
    def between(self, x: Tensor, ids: Tensor) -> Tensor:
        heads = x.view(*ids.shape, 2, -1).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(heads, heads, heads)
        return self.second(mixed.transpose(1, 2).reshape(x.shape) + x)


class SequenceFirstAttention(Net):
    """PyTorch's attention in its default order, beside a layer that holds the batch first."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2)

    def between(self, x: Tensor, ids: Tensor) -> Tensor:
        turned = x.transpose(0, 1)
        return self.second(x + self.attention(turned, turned, turned)[0].transpose(0, 1))


class Pooled(Net):
    def between(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.second(torch.cat([x.mean(1, keepdim=True), x], 1)[:, 0])


class Steps(Net):
    def between(self, x: Tensor, ids: Tensor) -> Tensor:
        state = x.new_zeros(len(x), WIDTH)
        for step in x.unbind(1):
            state = torch.tanh(self.second(step + state))
        return state


class Derived(transformers.PreTrainedModel):
    """A class of somebody's, as they come with checkpoints: what it derives from says nothing about its rows."""

    config_class = transformers.BertConfig

    def __init__(self) -> None:
        super().__init__(transformers.BertConfig())
        self.embed, self.first = nn.Embedding(64, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.post_init()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.first(self.embed(input_ids).transpose(0, 1)).transpose(0, 1)


class HeadOfChosen(nn.Module):
    """A model of transformers and a head of one's own, for tokens that a mask chooses."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.BertConfig(
            vocab_size=64, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20
        )
        self.bert, self.head = transformers.BertModel(config), nn.Linear(WIDTH, 5)

    def forward(self, input_ids: Tensor) -> Tensor:
        chosen = input_ids < 20
        result = torch.zeros(*chosen.shape, 5)
        result[chosen] = self.head(self.bert(input_ids).last_hidden_state[chosen])
        return result


def tokens(length: int) -> Tensor:
    """Ids of which four are below 20: as many as samples, but not one of each."""
    ids = torch.randint(20, 64, (BATCH, length), generator=torch.Generator().manual_seed(0))
    ids[0, 0] = ids[0, 1] = ids[1, 0] = ids[2, 1] = 7
    return ids


def adapted(net: nn.Module) -> Any:
    torch.manual_seed(0)
    config = ept.EPTConfig(
        r=2, num_tasks=3, kernel_sizes=(1, 1), target_modules="all-linear", exclude_modules=".*attention.*out_proj"
    )
    model = get_peft_model(net, config).eval()
    for name, parameter in model.named_parameters():
        if "ept_" in name:
            nn.init.normal_(parameter, std=0.4)
    return model


@pytest.mark.parametrize("length", [4, 6])
@pytest.mark.parametrize("net", [Net, Attention, SequenceFirstAttention, Pooled, Steps])
def test_rows_that_are_the_samples_are_told_by_what_made_them(net: type[nn.Module], length: int) -> None:
    model, ids = adapted(net()), tokens(length)
    alone = torch.cat([model(input_ids=ids[i : i + 1], task_ids=task) for i, task in enumerate(IDS)])
    for _ in range(2):  # watched, and then known
        torch.testing.assert_close(model(input_ids=ids, task_ids=IDS), alone, atol=1e-5, rtol=1e-4)
    assert _get_current_function_mode() is None


@pytest.mark.parametrize("net", [Net, Attention, SequenceFirstAttention, Pooled, Steps])
def test_gradients_of_a_mixed_batch_are_the_sum_of_its_rows(net: type[nn.Module]) -> None:
    model, ids = adapted(net()), tokens(6)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for _ in range(2):  # watched, and then known
        mixed = torch.autograd.grad(model(input_ids=ids, task_ids=IDS).square().sum(), list(trained.values()))
        rows = [model(input_ids=ids[i : i + 1], task_ids=task).square().sum() for i, task in enumerate(IDS)]
        alone = torch.autograd.grad(torch.stack(rows).sum(), list(trained.values()))
        for name, given, wanted in zip(trained, mixed, alone, strict=True):
            assert wanted.abs().max() > 0, name
            scale = wanted.abs().max()
            torch.testing.assert_close(
                given / scale, wanted / scale, atol=1e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}"
            )


@pytest.mark.parametrize(
    ("net", "layer", "length"),
    [
        (Masked, "second", 6),
        (Indexed, "second", 6),
        (Sorted, "second", 6),
        (TimeFirst, "second", 4),
        (SlotsFirst, "second", 6),
        (SampleBySample, "second", 4),
        (Derived, "first", 4),
        (HeadOfChosen, "head", 6),
    ],
)
def test_rows_that_are_as_many_by_accident_are_refused(net: type[nn.Module], layer: str, length: int) -> None:
    model, ids = adapted(net()), tokens(length)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"in layer '{layer}': its first dimension is as long as the ids"):
            model(input_ids=ids, task_ids=IDS)
    assert _get_current_function_mode() is None
    model(input_ids=ids, task_ids=[1] * BATCH)  # one task for all


def test_a_mask_that_chooses_one_row_of_each_sample_teaches_nothing() -> None:
    model, ids = adapted(Masked()), tokens(6)
    even = ids.masked_fill(ids < 20, 30)
    even[:, 2] = 7
    alone = torch.cat([model(input_ids=even[i : i + 1], task_ids=task) for i, task in enumerate(IDS)])
    torch.testing.assert_close(model(input_ids=even, task_ids=IDS), alone, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="in layer 'second'"):
        model(input_ids=ids, task_ids=IDS)


def test_the_ids_of_tokens_say_nothing_where_sequence_and_batch_are_equally_long() -> None:
    model, ids = adapted(Derived()), tokens(4)
    with pytest.raises(ValueError, match=r"one a token.*in layer 'first'"):
        model(input_ids=ids, task_ids=torch.tensor([IDS] * BATCH))
    model(input_ids=ids, task_ids=torch.ones(BATCH, BATCH, dtype=torch.long))
