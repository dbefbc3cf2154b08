"""``TuckALinear``: a layer by itself, or several that share a router inside one block."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import tucka_reference as reference
from pyramid_testing import assert_matches, assert_same_bits
from torch import nn

import ept
from ept import TuckAConfig, TuckALinear

CONFIG = TuckAConfig(r=4, num_groups=3, lora_alpha=20.0)


def layer(config: TuckAConfig = CONFIG, dtype: torch.dtype = torch.float64, **options) -> TuckALinear:
    torch.manual_seed(0)
    return TuckALinear(12, 10, config=config, dtype=dtype, **options)


def tokens(*lead: int, seed: int = 1, width: int = 12) -> torch.Tensor:
    return torch.randn(*lead, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def expected(made: TuckALinear, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    group, weights = reference.route(made.shared.router.centroids, x, 3, mask)
    return reference.linear(x, made.weight, made.bias, made.G, made.U, made.C, group, weights, 20.0)


def test_routes_by_its_own_input() -> None:
    made, x = layer(), tokens(2, 5)
    assert_same_bits(made.eval()(x), F.linear(x, made.weight, made.bias))
    assert_matches(made.train()(x), expected(made, x), 1e-12)
    assert_matches(made.eval()(tokens(3, 4, seed=2)), expected(made, tokens(3, 4, seed=2)), 1e-12)
    assert made(x[0, 0]).shape == (10,)


def test_shares_and_freezes_a_linear() -> None:
    linear = nn.Linear(12, 10)
    made = TuckALinear.from_linear(linear, CONFIG)
    assert made.weight is linear.weight
    assert not linear.weight.requires_grad
    trained = {name for name, p in made.named_parameters() if p.requires_grad}
    assert trained == {"G", "U", "C", "routing.router.centroids"}
    assert not made.shared.router.ready
    assert not made.shared.router.centroids.any()
    made(torch.randn(2, 5, 12)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in made.parameters() if p.requires_grad)


def test_layers_of_one_block_route_once_and_leave_padding_out() -> None:
    first = layer()
    second = TuckALinear(10, 7, config=CONFIG, shared=first.shared, dtype=torch.float64)
    x, mask = tokens(2, 5), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    with ept.use_tasks(0, mask):
        y = first(x)
        z = second(y)
    assert_matches(y, expected(first, x, mask), 1e-12)
    group, weights = reference.route(first.shared.router.centroids, x, 3, mask)
    exact = reference.linear(y, second.weight, second.bias, second.G, second.U, second.C, group, weights, 20.0)
    assert_matches(z, exact, 1e-12)
    assert int(first.shared.router.group_load.sum()) == 1
    with ept.use_tasks(0), pytest.raises(ValueError, match=r"x must be \[\.\.\., 12\]"):
        second(tokens(2, 5, width=10))


def test_saving_and_loading() -> None:
    made, x = layer(), tokens(2, 5)
    made(x)
    loaded = TuckALinear(12, 10, config=CONFIG, dtype=torch.float64)
    loaded.load_state_dict(made.state_dict())
    assert_same_bits(loaded.eval()(x), made.eval()(x))
    assert_same_bits(loaded.train()(x), made(x))


def test_merging_a_fixed_route() -> None:
    made, x = layer(), tokens(2, 5)
    made(x)
    original, free = made.weight.detach().clone(), made(x)
    with pytest.raises(ValueError, match="fix one route first"):
        made.merge(0)
    made.shared.fix(2, [0.9, 0.2])
    forced = made(x)
    made.merge()
    assert_matches(made(x), forced, 1e-12)
    made.unmerge()
    assert_same_bits(made.weight, original)
    made.shared.free()
    assert_same_bits(made(x), free)


def test_dropout_acts_on_the_update_alone() -> None:
    made, x = layer(TuckAConfig(r=4, num_groups=3, lora_alpha=20.0, lora_dropout=0.5)), tokens(4, 50)
    exact = made.train()(x)  # which makes the centroids
    exact = made.eval()(x)
    torch.manual_seed(3)
    first = made.train()(x)
    assert not torch.equal(first, exact)
    torch.manual_seed(3)
    assert_same_bits(made(x), first)
    base = F.linear(x, made.weight, made.bias)
    average = torch.stack([made(x) for _ in range(300)]).mean(0)
    assert_matches(average - base, exact - base, 0.3)


def test_wrong_configs() -> None:
    for bad, message in [
        ({"num_groups": 0}, "num_groups must be an integer >= 1, got 0"),
        ({"core_rank": True}, "core_rank must be an integer >= 1, got True"),
        ({"group_size": 1}, "group_size must be at least 2 where num_groups is 2"),
        ({"lora_alpha": 0}, "lora_alpha must be a number > 0, got 0"),
        ({"centroid_noise": -1.0}, "centroid_noise must be a number > 0, got -1.0"),
        ({"init": "zero"}, "init must be one of kaiming, centred, got 'zero'"),
        ({"init": "centred", "core_rank": 1}, "core_rank must be at least 2 where init is 'centred', got 1"),
        ({"router_module": ""}, "router_module must be None or the name of a module, got ''"),
    ]:
        with pytest.raises(ValueError, match=message):
            TuckAConfig(**bad)
    assert TuckAConfig(num_groups=1, group_size=1).group_size == 1
