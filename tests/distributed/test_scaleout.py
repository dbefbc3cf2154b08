"""Two processes against one: the same losses, scores and adapter, whatever engine shares the work.

One launch makes all runs, since starting a process takes seconds. ``make scaleout`` makes the rest, with four processes
as well, and prints how far apart the results are (``matrix.py``).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))

from compare import distance, loss_distance, score_distance, unequal
from launch import launch
from scenarios import RUNS, SMALL, TASKS, perform

from ept.files import read_json
from ept.training import evaluate_tasks, load_trained

PROCESSES = 2
WAY = 1e-9  # of the way that training took; rounding of float64, which six AdamW steps leave at 1e-15 to 1e-12
LOSS = 3e-6  # the log is fp32, and a mean of two roundings is not the rounding of the mean

EQUAL = (
    *(f"{system} encoder" for system in SMALL),
    "ept causal",
    "ept seq2seq",
    "ept encoder, own seeds",
    "tucka encoder, own seeds",
    "ept causal, accumulated",
    "tucka encoder, single-task batches",
)
SHARDED = ("ept encoder FSDP2", "ept causal FSDP2")
BLOCKS = ("ept blocks fully_shard", "ept blocks FSDP1", "more blocks FSDP1")
NAMES = (*EQUAL, *SHARDED, *BLOCKS, "tucka encoder FSDP2, not started", "ept encoder checkpointed")
NAMES += ("tucka encoder checkpointed", "unused", "ept-train")

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this build of torch has no distributed package"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What each process of the launch found."""
    return launch(PROCESSES, NAMES, folder)


def alone(name: str, folder: Path) -> dict[str, Any]:
    return perform(name, folder / "alone")


@pytest.mark.parametrize("name", EQUAL)
def test_data_parallel_training_equals_that_of_one_process(name: str, found: dict, folder: Path) -> None:
    """Losses of every step, adapter and scores; and all ranks end with the same bits, whatever they started from."""
    wanted, ranks = alone(name, folder), found[name]
    assert distance(ranks[0]["after"], wanted["after"], wanted["before"]) < WAY
    assert loss_distance(ranks[0]["losses"], wanted["losses"]) < LOSS
    for result in ranks:
        assert score_distance(result["scores"], wanted["scores"]) < 1e-5
    assert unequal([result["after"] for result in ranks]) == []
    assert unequal([result["buffers"] for result in ranks]) == []
    if RUNS[name].options.get("own_seeds"):
        assert unequal([result["before"] for result in ranks]) != []


def test_the_shared_table_and_router_are_among_what_was_compared(found: dict) -> None:
    prefix = "base_model.ept_task_tables.default."
    assert f"{prefix}weight" in found["ept encoder, own seeds"][0]["after"]
    assert f"{prefix}prototypes.mean" in found["ept encoder, own seeds"][0]["buffers"]
    assert f"{prefix}router.centroids" in found["tucka encoder, own seeds"][0]["after"]
    assert found["tucka encoder, own seeds"][0]["buffers"][f"{prefix}router.initialised"]


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_training_equals_that_of_one_process(name: str, found: dict, folder: Path) -> None:
    """And ``save_model`` gathers all of the adapter, from which a single process loads it."""
    wanted, ranks = alone(name, folder), found[name]
    assert ranks[0]["sharded parameters"] == len(wanted["before"])
    assert loss_distance(ranks[0]["losses"], wanted["losses"]) < LOSS
    assert score_distance(ranks[0]["scores"], wanted["scores"]) < 1e-5
    file = Path(name.replace(" ", "-")) / "adapter" / "adapter_model.safetensors"
    saved, expected = load_file(folder / file), load_file(folder / "alone" / file)
    assert distance(saved, expected, {key: torch.zeros_like(value) for key, value in saved.items()}) < WAY


@pytest.mark.parametrize("name", BLOCKS)
def test_sharding_block_by_block_in_a_loop_of_ones_own(name: str, found: dict, folder: Path) -> None:
    wanted, ranks = alone(name, folder), found[name]
    assert distance(ranks[0]["after"], wanted["after"], wanted["before"]) < WAY
    assert loss_distance(ranks[0]["losses"], wanted["losses"]) < LOSS


def test_a_loss_of_parameters_that_fsdp1_has_sharded_is_refused(found: dict) -> None:
    for result in found["ept blocks FSDP1"]:
        assert "contrastive_weight is 0.1, but FSDP1 shards this model" in result["refused"]


def test_sharding_what_a_training_pass_must_write_is_refused(found: dict) -> None:
    for result in found["tucka encoder FSDP2, not started"]:
        assert "call the model once in training mode" in result["error"]


@pytest.mark.parametrize("system", ["ept", "tucka"])
def test_checkpointing_replays_the_dropout_of_every_rank(system: str, found: dict) -> None:
    ranks = found[f"{system} encoder checkpointed"]
    for result in ranks:
        assert unequal([result["kept"], result["recomputed"]]) == []
    assert unequal([result["kept"] for result in ranks]) == []  # averaged


def test_a_parameter_without_a_use_is_an_error_that_nobody_waits_for(found: dict) -> None:
    for result in found["unused"]:
        assert "find_unused_parameters" in result["error"]


def test_the_command_line_writes_once_what_all_processes_trained(found: dict, folder: Path) -> None:
    output = folder / "ept-train" / "output"
    written = {path.name for path in output.iterdir()}
    assert written == {"adapter", "checkpoints", "metrics.json", "pictures", "settings.json"}
    model, tokenizer, _ = load_trained(output)
    scores = read_json(output / "metrics.json")["tasks"]
    for task, metrics in evaluate_tasks(model, tokenizer, TASKS, max_length=32).items():
        for metric, value in metrics.items():
            assert scores[task]["after"][metric] == pytest.approx(value, abs=1e-5)
    states = {path.name for path in (output / "checkpoints" / "checkpoint-6").glob("rng_state_*")}
    assert states == {f"rng_state_{rank}.pth" for rank in range(PROCESSES)}
