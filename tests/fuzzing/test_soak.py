"""Many training steps with inference between: memory stays where it was. ``make soak`` takes 2,000 steps."""

from __future__ import annotations

import gc
import os
import tracemalloc

import psutil
import torch

import ept

from .saved import inputs, make
from .support import COUNTED

STEPS = int(os.environ.get("EPT_SOAK_STEPS", "100"))


def test_memory_stays_flat() -> None:
    torch.manual_seed(0)
    model = make("ept").train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("ept_" in name or "modules_to_save" in name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step(number: int) -> None:
        tasks = torch.randint(3, (3,))
        loss = model.train()(torch.randn(3, 12), task_ids=tasks).square().mean() + ept.auxiliary_loss(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():  # the folds that are kept are out of date after every step
            model.eval()(inputs(), task_ids=tasks)
            model(inputs(), task_ids=number % 3)

    for number in range(STEPS // 4):
        step(number)
    process = psutil.Process()
    gc.collect()
    tracemalloc.start()
    objects, resident, traced = len(gc.get_objects()), process.memory_info().rss, tracemalloc.get_traced_memory()[0]
    for number in range(STEPS):
        step(number)
    gc.collect()
    more_objects = len(gc.get_objects()) - objects
    more_traced = tracemalloc.get_traced_memory()[0] - traced
    tracemalloc.stop()
    more_resident = process.memory_info().rss - resident
    COUNTED["soak"][
        f"steps, with {more_objects:+} objects, {more_traced:+} B of Python, {more_resident:+} B resident"
    ] += STEPS
    # A tensor or graph node that each step left behind would be one object a step, and hundreds of bytes.
    assert more_objects < 50 + STEPS // 20, f"{more_objects} more objects after {STEPS} steps"
    assert more_traced < 100_000 + 50 * STEPS, f"{more_traced} more bytes of Python after {STEPS} steps"
    assert more_resident < 16 * 2**20 + 2**10 * STEPS, f"{more_resident} more bytes resident after {STEPS} steps"
