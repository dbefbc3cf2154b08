"""``CentroidRouter``: its decision, its first centroids, what it saves, what it counts, padding."""

from __future__ import annotations

import copy
import gc
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import tucka_reference as reference
from pyramid_testing import HOST_READS, Recorder, assert_matches, assert_same_bits
from torch import nn

from ept import TuckAConfig, TuckALinear
from ept.baselines.tucka.router import CentroidRouter, data_aware_centroids

D, K, T = 24, 3, 2


def router(dtype: torch.dtype = torch.float64, noise: float = 1.0) -> CentroidRouter:
    return CentroidRouter(D, K, T, noise, dtype=dtype)


def ready(dtype: torch.dtype = torch.float64, seed: int = 0) -> CentroidRouter:
    generator = torch.Generator().manual_seed(seed)
    made = router(dtype)
    centroids = torch.randn(K * T, D, generator=generator, dtype=torch.float64).to(dtype)
    made.load_state_dict({"centroids": centroids, "initialised": torch.tensor(True)})
    return made


def tokens(*lead: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*lead, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("seed", range(8))
def test_decision_and_gradients(seed: int) -> None:
    """Scores of the best's group; through them the chosen group's centroids learn, the others not, and so does x."""
    made, x = ready(seed=seed), tokens(4, 7, seed=seed).requires_grad_()
    route = made(x)
    group, weights = reference.route(made.centroids, x, K)
    assert route.group.tolist() == [group]
    assert route.group.dtype == torch.int64
    assert_matches(route.weights, weights, 1e-12)
    ours = torch.autograd.grad(route.weights @ torch.tensor([1.0, 2.0]).double(), (made.centroids, x))
    expected = torch.autograd.grad(weights @ torch.tensor([1.0, 2.0]).double(), (made.centroids, x))
    for actual, exact in zip(ours, expected, strict=True):
        assert_matches(actual, exact, 1e-11)
    by_group = ours[0].view(K, T, D).abs().sum((1, 2))
    assert by_group.nonzero().flatten().tolist() == [group]


def test_padding_does_not_change_the_route() -> None:
    made, x = ready(torch.float32), tokens(3, 5, dtype=torch.float32)
    expected = made(x)
    for extra in (1, 11):
        padded = torch.cat([x, torch.full((3, extra, D), float("nan"))], 1)  # whatever stands there
        mask = torch.tensor([1] * 5 + [0] * extra).expand(3, -1)
        route = made(padded, mask)
        assert torch.equal(route.group, expected.group)
        assert_matches(route.weights, expected.weights, 1e-6)
    ragged = torch.tensor([[1, 1, 0, 0, 0], [1] * 5, [1, 0, 0, 0, 0]])
    kept = torch.cat([x[0, :2], x[1], x[2, :1]])
    assert_matches(made(x, ragged).weights, made(kept).weights, 1e-6)
    assert_matches(made(x, ragged).weights, made(x, ragged.bool()).weights, 0.0)


def test_a_mask_of_another_shape_is_ignored() -> None:
    made, x = ready(), tokens(3, 5)
    for mask in (torch.zeros(3, 4), torch.zeros(3, 1, 5, 5), torch.zeros(5, 3)):
        assert_same_bits(made(x, mask).weights, made(x).weights)


def test_no_tokens_at_all() -> None:
    made = ready()
    for x, mask in ((tokens(0, 5), None), (tokens(2, 3), torch.zeros(2, 3))):
        route = made(x, mask)
        assert 0 <= int(route.group) < K
        assert_same_bits(route.weights, torch.full((T,), 0.5, dtype=torch.float64))
        route.weights.sum().backward()
        assert torch.isfinite(made.centroids.grad).all()


def test_half_precision_is_summed_in_fp32() -> None:
    made, x = ready(torch.float32), tokens(8, 64, dtype=torch.bfloat16)
    route = made(x)
    assert route.weights.dtype == torch.float32
    assert_matches(route.weights, made(x.float()).weights, 1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(made(x.float()).weights, made(x.float()).weights.float())


def test_first_training_batch_makes_the_centroids() -> None:
    """``E_0`` is the batch's mean, the others within the noise of it, and the next batch changes nothing."""
    made, x = router(noise=0.25), tokens(4, 7)
    assert made(x).weights.shape == (T,)
    assert made.ready
    assert bool(made.initialised)
    offsets = made.centroids.detach() - x.mean((0, 1))
    assert_matches(offsets[0] + 1, torch.ones(D, dtype=torch.float64), 1e-12)
    assert offsets[1:].abs().max() <= 0.25
    assert offsets[1:].abs().max() > 0.2
    assert offsets[1:].std() == pytest.approx(0.25 / 3**0.5, rel=0.2)
    before = made.centroids.detach().clone()
    made(tokens(2, 3, seed=5))
    assert_same_bits(made.centroids, before)


def test_the_first_mean_leaves_padding_out() -> None:
    made, x = router(), tokens(2, 5)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    made(x, mask)
    assert_matches(made.centroids[0], torch.cat([x[0, :3], x[1, :1]]).mean(0), 1e-12)


def test_evaluation_initialises_nothing() -> None:
    made = router().eval()
    state = torch.get_rng_state()
    assert made(tokens(2, 3)) is None
    assert not made.ready
    assert not made.centroids.any()
    assert torch.equal(torch.get_rng_state(), state)
    assert made.train()(tokens(2, 3)) is not None
    assert made.eval()(tokens(2, 3)) is not None


def test_loaded_centroids_are_never_drawn_anew(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    trained = router()
    trained(tokens(4, 7))
    save_file(trained.state_dict(), tmp_path / "router.safetensors")
    loaded = router()
    loaded.load_state_dict(load_file(tmp_path / "router.safetensors"))
    assert loaded.ready
    loaded.train()(tokens(9, 9, seed=3))  # further training goes on from them
    assert_same_bits(loaded.centroids, trained.centroids)
    assert copy.deepcopy(loaded).ready
    untrained = router()
    loaded.load_state_dict(untrained.state_dict())
    assert not loaded.ready


def test_load_is_counted_on_the_device_and_not_saved() -> None:
    made = ready()
    chosen = [int(made(tokens(1, 3, seed=seed)).group) for seed in range(20)]
    assert made.group_load.tolist() == [chosen.count(group) for group in range(K)]
    assert len(set(chosen)) > 1
    made(tokens(1, 3), count=False)
    assert int(made.group_load.sum()) == 20
    assert "group_load" not in made.state_dict()
    made.reset_group_load()
    assert not made.group_load.any()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("start", [router, ready])
def test_nothing_is_read_by_the_host(start, masked: bool) -> None:
    made, mask = start(), torch.ones(2, 3) if masked else None
    with Recorder() as recorder:
        made(tokens(2, 3), mask)
    assert not set(recorder.names()) & set(HOST_READS)


def test_another_width_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"x must be \[\.\.\., 24\], the width of the router's centroids, got \[2, 23\]"
    ):
        ready()(torch.randn(2, 23))


# --- ranks ------------------------------------------------------------------------------------------------------------


def _rank(rank: int, world: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    try:
        torch.manual_seed(rank)  # ranks disagree about noise and data
        made, x = router(), tokens(2 + rank, 5, seed=rank)
        made(x)
        torch.save({"centroids": made.centroids.detach(), "x": x}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_every_rank_has_the_same_centroids(tmp_path: Path) -> None:
    """Around the mean over all ranks' tokens, the same to the bit."""
    mp.spawn(_rank, args=(2, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert_same_bits(first["centroids"], second["centroids"])
    everything = torch.cat([rank["x"].flatten(0, 1) for rank in (first, second)])
    assert_matches(first["centroids"][0], everything.mean(0), 1e-12)
    assert first["centroids"].std(0).min() > 0


def _train(rank: int, world: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    try:
        torch.manual_seed(0)
        layer = TuckALinear(D, 5, config=TuckAConfig(r=3, num_groups=K))
        parallel = nn.parallel.DistributedDataParallel(layer)
        optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.01)
        for step in range(3):
            parallel(tokens(2, 5, seed=10 * step + rank, dtype=torch.float32)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.save({**layer.state_dict(), "load": layer.shared.router.group_load}, f"{folder}/{rank}.pt")
        # Before the group goes: if the reducer holds it last, torch may wait for ever, with Python's lock in hand, for
        # a thread of gloo that needs the lock to let go of its last result.
        del parallel
        gc.collect()
    finally:
        dist.destroy_process_group()


def test_data_parallel_training_keeps_ranks_together(tmp_path: Path) -> None:
    """The same parameters on every rank, each with its own count of the batches that it routed."""
    mp.spawn(_train, args=(2, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert [int(state.pop("load").sum()) for state in (first, second)] == [3, 3]
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert_same_bits(tensor, second[name], name)
    assert bool(first["routing.router.initialised"])


def test_noise_follows_the_generator() -> None:
    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return data_aware_centroids(tokens(1, 1)[0, 0], torch.tensor(1.0).double(), 6, 2.0)

    assert_same_bits(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
