"""``ept.row_layout``: how the rows run that a layer sees."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

import ept
from ept import EPTConfig, EPTLinear, row_layout, use_tasks

IDS = torch.tensor([2, 0, 1])


@pytest.fixture
def layer() -> EPTLinear:
    torch.manual_seed(0)
    made = EPTLinear(6, 5, config=EPTConfig(r=2, num_tasks=3, kernel_sizes=(2, 2, 3), task_embedding_dim=4))
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


def each(layer: EPTLinear, x: Tensor, ids: Tensor) -> Tensor:
    """Every row of x ``[rows, in]`` under its own id."""
    return torch.stack([layer(row[None], int(task))[0] for row, task in zip(x, ids, strict=True)])


def test_batch_second(layer: EPTLinear) -> None:
    x = torch.randn(4, 3, 6)
    with use_tasks(IDS):
        with pytest.raises(ValueError, match=r"got 3 \(one a sample\), in layer '': which of its rows"):
            layer(x)
        with row_layout("batch_second"):
            given = layer(x)
            with pytest.raises(ValueError, match="its layout is 'batch_second', which this shape does not fit"):
                layer(x[:, :2])
        with pytest.raises(ValueError, match="which of its rows"):
            layer(x)  # over
    torch.testing.assert_close(given, each(layer, x.flatten(0, 1), IDS.repeat(4)).view(4, 3, 5))


def test_rows(layer: EPTLinear) -> None:
    x = torch.randn(12, 6)
    samples = torch.tensor([1, 1, 0, 2, 0, 0, 2, 1, 1, 0, 2, 2])
    ends = torch.tensor([0, 2, 9, 12], dtype=torch.int32)
    with use_tasks(IDS):
        with row_layout():
            torch.testing.assert_close(layer(x), each(layer, x, IDS.repeat_interleave(4)))
        with row_layout(samples=samples):
            torch.testing.assert_close(layer(x), each(layer, x, IDS[samples]))
            with pytest.raises(ValueError, match="a selection of tokens that could not be followed"):
                layer(x[:4])
        with row_layout(cu_seqlens=ends):
            places = torch.tensor([0] * 2 + [1] * 7 + [2] * 3)
            torch.testing.assert_close(layer(x), each(layer, x, IDS[places]))


def test_a_mixture_follows_the_same_layouts(layer: EPTLinear) -> None:
    x, weights = torch.randn(4, 3, 6), torch.rand(3, 3).softmax(1)
    with use_tasks(ept.TaskMixture(weights)), row_layout("batch_second"):
        given = layer(x)
    torch.testing.assert_close(given, layer(x.transpose(0, 1), ept.TaskMixture(weights)).transpose(0, 1))


def test_ids_of_tokens(layer: EPTLinear) -> None:
    x, ids = torch.randn(2, 5, 6), torch.randint(0, 3, (2, 5))
    wanted = each(layer, x.flatten(0, 1), ids.flatten()).view(2, 5, 5)
    for given in (ids, ids.numpy(), ids.tolist()):
        with use_tasks(given):
            torch.testing.assert_close(layer(x), wanted)
    with use_tasks(ids):
        with row_layout("batch_second"):
            torch.testing.assert_close(layer(x.transpose(0, 1)), wanted.transpose(0, 1))
        with pytest.raises(ValueError, match=r"got 10 \(one a token\)"):
            layer(x[:, 0])
    with pytest.raises(ValueError, match=r"lists of the lengths \[1, 2\]"), use_tasks([[0], [1, 2]]):
        pass


def test_equal_ids_are_one_for_every_row(layer: EPTLinear) -> None:
    x = torch.randn(7, 2, 6)
    for ids in ([1, 1, 1], torch.tensor([1, 1, 1])):
        with use_tasks(ids):
            torch.testing.assert_close(layer(x), layer(x, 1))


def test_as_a_decorator(layer: EPTLinear) -> None:
    @row_layout("batch_second")
    def turned(x: Tensor) -> Tensor:
        return layer(x)

    x = torch.randn(4, 3, 6)
    assert turned(x).shape == (4, 3, 5) if layer.shared.num_tasks == 1 else True
    with use_tasks(IDS):
        first, second = turned(x), turned(x)
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layout": "batch_third"}, "layout must be one of batch_first, batch_second, rows, got 'batch_third'"),
        ({"layout": "batch_first", "samples": IDS}, "may be given with layout='rows'"),
        ({"samples": IDS, "cu_seqlens": IDS}, "not both"),
        ({"samples": IDS.float()}, r"must be 1-D integers, got \[3\] torch.float32"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message), row_layout(**arguments):
        pass


@pytest.mark.parametrize("given", [["mix"], {"mix": "batch_third"}, {1: "rows"}, {"(": "rows"}])
def test_a_bad_layout_in_a_config_is_named(given: object) -> None:
    with pytest.raises(ValueError, match="row_layout"):
        EPTConfig(row_layout=given)


class Square(nn.Module):
    """``mix`` gets its input in a way that nobody can follow, where ``hides``."""

    def __init__(self, hides: bool) -> None:
        super().__init__()
        self.mix, self.hides = nn.Linear(6, 6), hides

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        return self.mix(torch.from_numpy(inputs_embeds.numpy()) if self.hides else inputs_embeds)


def test_a_square_input_is_refused_until_another_has_shown_which_dimension_is_the_batch() -> None:
    config = EPTConfig(r=2, num_tasks=3, kernel_sizes=(2, 2, 3), target_modules=["mix"])
    model = get_peft_model(Square(hides=True), config)
    x = torch.randn(3, 3, 6)
    with pytest.raises(ValueError, match="may be another than the batch in a module that is unknown"):
        model(inputs_embeds=x, task_ids=IDS)
    model(inputs_embeds=x, task_ids=0)
    model(inputs_embeds=x[:, :2], task_ids=IDS)
    model(inputs_embeds=x, task_ids=IDS)
    get_peft_model(Square(hides=False), config)(inputs_embeds=x, task_ids=IDS)  # it is plain to see
