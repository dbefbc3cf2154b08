"""Eight threads on one model: the results are those of one call after another, bit for bit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import ept

from .saved import CONFIGS, inputs, make
from .support import COUNTED, FACTOR

_THREADS, _ROUNDS = 8, 12


def _ids(seed: int) -> torch.Tensor | int:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, (3,), generator=generator)
    return ids if seed % 3 else int(ids[0])


def _together(work: Callable[[int], torch.Tensor], count: int) -> list[torch.Tensor]:
    """``work(0)`` to ``work(count - 1)``, by threads that start at once."""
    gate = threading.Barrier(_THREADS)

    def run(thread: int) -> list[torch.Tensor]:
        gate.wait()
        return [work(job) for job in range(thread, count, _THREADS)]

    with ThreadPoolExecutor(_THREADS) as pool:
        parts = list(pool.map(run, range(_THREADS)))
    return [parts[job % _THREADS][job // _THREADS] for job in range(count)]


def _count() -> int:
    return _THREADS * _ROUNDS * FACTOR


def _compare(work: Callable[[int], torch.Tensor], what: str) -> None:
    expected = [work(job) for job in range(_count())]
    assert len({tuple(result.flatten().tolist()) for result in expected}) > 1, "tasks must matter here"
    found = _together(work, _count())
    for job, (result, truth) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(result, truth), f"{what}: call {job} differs"
    COUNTED["calls from 8 threads"][what] += len(found)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("dcft", "tucka")])
def test_tasks_do_not_meet(name: str) -> None:
    model = make(name)

    @torch.no_grad()
    def work(job: int) -> torch.Tensor:
        return model(x=inputs(), task_ids=_ids(job))

    _compare(work, name)


def test_kept_folds_are_renewed_by_many_threads_at_once() -> None:
    """A parameter changes, then all threads find what is kept out of date together."""
    model = make("ept")
    gates = [parameter for name, parameter in model.named_parameters() if name.endswith("gate")]
    for change in range(4 * FACTOR):
        with torch.no_grad():
            for gate in gates:
                gate.add_(torch.randn(gate.shape))

        @torch.no_grad()
        def work(job: int) -> torch.Tensor:
            return model(x=inputs(), task_ids=_ids(job))

        found = _together(work, _THREADS * 2)
        expected = [work(job) for job in range(_THREADS * 2)]
        assert all(map(torch.equal, found, expected)), change


def test_a_block_of_tasks_is_a_thread_s_own() -> None:
    layer = ept.EPTLinear.from_linear(torch.nn.Linear(12, 10), ept.EPTConfig(r=2, num_tasks=3)).eval()
    for kernel in layer.kernels:
        torch.nn.init.normal_(kernel)

    @torch.no_grad()
    def work(job: int) -> torch.Tensor:
        with ept.use_tasks(_ids(job)):
            return layer(inputs())

    _compare(work, "use_tasks")


def test_an_error_in_one_thread_is_its_own() -> None:
    model = make("ept")
    refused = []

    @torch.no_grad()
    def work(job: int) -> torch.Tensor:
        if job % 4 == 1:
            try:
                model(x=inputs(), task_ids=torch.tensor([0, 99, 1]))
            except ValueError:
                refused.append(job)
        if job % 4 == 2:
            try:
                model(x=torch.ones(3, 5), task_ids=_ids(job))  # fails in the middle of the pass
            except (RuntimeError, ValueError):
                refused.append(job)
        return model(x=inputs(), task_ids=_ids(job))

    _compare(work, "with errors between")
    assert len(refused) == _count()  # half of the jobs, twice


def test_one_merged_model_beside_one_that_is_not() -> None:
    plain, merged = make("ept"), make("ept")
    merged.merge_adapter(task=1)

    @torch.no_grad()
    def work(job: int) -> torch.Tensor:
        return merged(x=inputs()) if job % 2 else plain(x=inputs(), task_ids=_ids(job))

    _compare(work, "merged and not")
    merged.unmerge_adapter()
    with torch.no_grad():
        assert torch.equal(merged(x=inputs(), task_ids=2), plain(x=inputs(), task_ids=2))


def test_training_in_one_thread_does_not_show_in_the_others() -> None:
    served = make("ept")

    def train() -> list[torch.Tensor]:
        torch.manual_seed(3)
        model = make("ept").train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("ept_" in name)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for step in range(20 * FACTOR):
            loss = model(x=inputs(), task_ids=_ids(step)).square().mean() + ept.auxiliary_loss(model)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return [parameter.detach().clone() for parameter in model.parameters()]

    @torch.no_grad()
    def serve(job: int) -> torch.Tensor:
        return served(x=inputs(), task_ids=_ids(job))

    alone, expected = train(), [serve(job) for job in range(_count())]
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(train)
        found = _together(serve, _count())
        beside = training.result()
    assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, beside, alone)), "training came out otherwise with threads beside it"
    COUNTED["calls from 8 threads"]["beside training"] += len(found)


def test_mixlora_outside_a_model_keeps_no_route_of_an_earlier_call() -> None:
    """It did, where the input was the same object: with new numbers in it, or after a step, the route was wrong."""
    torch.manual_seed(0)
    layer = ept.MixLoRALinear.from_linear(torch.nn.Linear(12, 10), ept.MixLoRAConfig(r=2, num_experts=5, num_tasks=3))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    buffer = inputs()
    with torch.no_grad():
        first = layer(buffer)
        buffer.copy_(-inputs())
        assert torch.equal(layer(buffer), layer(-inputs()))
        buffer.copy_(inputs())
        assert torch.equal(layer(buffer), first)

    @torch.no_grad()
    def work(job: int) -> torch.Tensor:
        return layer(inputs() + job)

    _compare(work, "mixlora layer")
