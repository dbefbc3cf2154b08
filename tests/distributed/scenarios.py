"""Named training runs that a test makes alone and every process of a launch makes together, to compare the two.

``python scenarios.py OUTPUT NAME...`` writes ``OUTPUT/<name>.<rank>.pt`` for every run. The samples of a step and their
number do not depend on how many processes share them. ``float64``, unless a name says otherwise: then what is left of
a difference is rounding, 1e-15, and anything that is not the same mathematics shows.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import torch
import torch.distributed as dist
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from peft import PeftModel, get_peft_model
from systems_testing import SMALL
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from training.conftest import DEGREE, POLARITY, TOPIC, VOCABULARY, make_model, make_task, make_tokenizer, write_source

import ept
from ept import models, train
from ept.training import EPTTrainer, EPTTrainingArguments
from ept.training.options import SYSTEMS
from ept.training.run import TASK_TYPES

GLOBAL_BATCH = 8  # with four processes two samples of three tasks each: there are always tasks that a process lacks
TASKS = [make_task(POLARITY, 10, 7), make_task(TOPIC, 20, 9), make_task(DEGREE, 12, 5)]

Result = dict[str, Any]


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def make_adapted(system: str, kind: str, *, seed: int = 1, dtype: str = "float64", **options: Any) -> PeftModel:
    """A random model without dropout and, by ``seed``, a random adapter."""
    specs = [task.spec for task in TASKS]
    model = make_model(kind, specs)
    for module in model.modules():
        for name in ("p", "dropout_prob", "dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    torch.manual_seed(seed)
    config = SYSTEMS[system].make_config(
        [spec.name for spec in specs],
        target_modules=models.target_modules(model),
        modules_to_save=["heads"] if kind == "encoder" else None,
        task_type=TASK_TYPES[kind],
        **{**SMALL[system], **options},
    )
    return get_peft_model(model, config).to(getattr(torch, dtype))


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def make_trainer(model: PeftModel, kind: str, folder: Path, **options: Any) -> EPTTrainer:
    """A quiet trainer of ``GLOBAL_BATCH`` samples a step over all processes."""
    share = world_size() * options.get("gradient_accumulation_steps", 1)
    defaults = {
        "output_dir": str(folder / "checkpoints"),
        "max_steps": 6,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": GLOBAL_BATCH // share,
        "logging_steps": 1,
        "save_strategy": "no",
        "max_new_tokens": 3,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "report_to": "none",
    }
    arguments = EPTTrainingArguments(**{**defaults, **options})
    return EPTTrainer(model, arguments, tasks=TASKS, processing_class=make_tokenizer(kind))


def record(trainer: EPTTrainer) -> Result:
    """The trainer's log, and the scores of its model."""
    keys = ("loss", "task_loss", "contrastive_loss", "load_balance_loss", "orthogonality_loss")
    logged = {key: [entry[key] for entry in trainer.state.log_history if key in entry] for key in keys}
    return {"losses": logged, "scores": trainer.evaluate_by_task()}


def data_parallel(
    folder: Path,
    system: str,
    kind: str,
    *,
    adapter: dict[str, Any] | None = None,
    own_seeds: bool = False,
    dtype: str = "float64",
    **options: Any,
) -> Result:
    """Training by ``EPTTrainer``; with ``own_seeds`` each process starts from an adapter of its own."""
    model = make_adapted(system, kind, seed=1 + own_seeds * rank(), dtype=dtype, **(adapter or {}))
    trainer = make_trainer(model, kind, folder, **options)
    before = trained(model)
    trainer.train()
    buffers = {name: buffer for name, buffer in model.named_buffers() if "ept_task_tables" in name}
    return {"before": before, "after": trained(model), "buffers": buffers, **record(trainer)}


def sharded(folder: Path, system: str, kind: str, *, started: bool = False) -> Result:
    """Training and saving by ``EPTTrainer`` under FSDP2; alone, without.

    accelerate gives FSDP to accelerators only and trains data-parallel on a CPU: its state is told otherwise, the rest
    of the way is that of a GPU. ``started``: after one pass of the unsharded model (for TuckA).
    """
    model = make_adapted(system, kind)
    before = trained(model)
    if started:
        with torch.no_grad():
            model.train()(**samples(kind))
    several = {"fsdp": True, "fsdp_config": {"version": 2}} if world_size() > 1 else {}
    trainer = make_trainer(model, kind, folder, **several)

    def shard() -> None:
        if several:
            trainer.is_fsdp_enabled = True
            trainer.accelerator.state.distributed_type = DistributedType.FSDP
            trainer.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)

    shard()
    trainer.train()
    shard()  # Trainer makes its accelerator anew
    parts = sum(hasattr(parameter, "placements") for parameter in trainer.model.parameters() if parameter.requires_grad)
    trainer.save_model(str(folder / "adapter"))
    return {"before": before, "sharded parameters": parts, **record(trainer)}


def samples(kind: str, step: int = 0) -> dict[str, Tensor]:
    """This process's share of a global batch of random samples."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(5, len(VOCABULARY), (GLOBAL_BATCH, 9), generator=generator)
    mask = (torch.arange(9) < torch.randint(4, 10, (GLOBAL_BATCH, 1), generator=generator)).long()
    labels = torch.tensor([0.0, 1, 2.5, 1, 2, 3, 0, 1]) if kind == "encoder" else ids
    tasks = torch.tensor([0, 1, 2, 0, 1, 2, 1, 1])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "task_ids": tasks}
    return {name: value[rank() :: world_size()].contiguous() for name, value in batch.items()}


def own_loop(folder: Path, system: str, version: int = 2) -> Result:
    """A loop without ``Trainer``: every block of an encoder and the rest sharded by torch's FSDP of a version."""
    model = make_adapted(system, "encoder").train()
    before, wrapped = trained(model), model
    blocks = model.get_base_model().encoder.encoder.layer
    if world_size() > 1 and version == 1:
        policy = ModuleWrapPolicy({type(blocks[0])})
        options = {"use_orig_params": True, "device_id": torch.device("cpu")}
        wrapped = FullyShardedDataParallel(model, auto_wrap_policy=policy, **options)
    elif world_size() > 1:
        for layer in blocks:
            fully_shard(layer, reshard_after_forward=True)
        fully_shard(model)
    optimizer = torch.optim.AdamW(ept.parameter_groups(model, lr=1e-2))
    losses = []
    for step in range(4):
        loss = wrapped(**samples("encoder", step)).loss
        if version == 2:  # FSDP1 has whole parameters inside the forward pass alone
            loss = loss + ept.auxiliary_loss(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean_over_ranks(loss.detach()).item())
    state = get_model_state_dict(wrapped, options=StateDictOptions(full_state_dict=True))
    after = {name: state[name] for name in before}
    return {
        "before": before,
        "after": after,
        "losses": {"loss": losses},
        "refused": _refused(model) if version == 1 else None,
    }


def _refused(model: nn.Module) -> str | None:
    """Why there is no auxiliary loss."""
    try:
        ept.auxiliary_loss(model)
    except ValueError as error:
        return str(error)
    return None


def mean_over_ranks(value: Tensor) -> Tensor:
    if world_size() > 1:
        dist.all_reduce(value)
    return value / world_size()


def checkpointed(folder: Path, system: str, kind: str) -> Result:
    """Gradients with dropout, of a pass that keeps its activations and of one that computes them anew.

    In float64 where they cannot have the same bits: blocks of T5's decoder all add to the gradient of the encoder's
    output, in an order that recomputing changes.
    """
    dtype = "float64" if kind == "seq2seq" else "float32"
    found = []
    for recompute in (False, True):
        model = make_adapted(system, kind, dtype=dtype, lora_dropout=0.3).train()
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        if recompute:
            model.get_base_model().activation_checkpointing_enable(
                activation_checkpointing_kwargs={"use_reentrant": False}
            )
        parallel = DistributedDataParallel(model) if world_size() > 1 else model
        torch.manual_seed(3 + rank())
        batch = samples(kind)
        if system == "lora" and kind != "encoder":
            batch.pop("task_ids")
        loss = parallel(**batch).loss
        if system != "lora":
            loss = loss + ept.auxiliary_loss(model)
        loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    return {"kept": found[0], "recomputed": found[1]}


def unused(folder: Path) -> Result:
    """A parameter that no step uses (centroids under a fixed route): what torch says of it, and that nothing waits."""
    model = make_adapted("tucka", "encoder", dtype="float32").train()
    with torch.no_grad():
        model(**samples("encoder"))
    ept.fix_route(model, 0, [1.0] * model.active_peft_config.group_size)
    parallel = DistributedDataParallel(model) if world_size() > 1 else model
    try:
        for step in range(2):
            parallel(**samples("encoder", step)).loss.backward()
    except RuntimeError as error:
        return {"error": str(error)}
    return {"error": None}


def command_line(folder: Path) -> Result:
    """``ept-train``; it ends the job's group of processes, so this is the last run of a launch."""
    if rank() == 0:
        write_source(folder / "source", TASKS)
    if world_size() > 1:
        dist.barrier()
    options = {"model": folder / "source" / "model", "data": folder / "source" / "data", "output": folder / "output"}
    options |= {"r": 2, "kernel_sizes": "1,2,2", "dropout": 0.1, "lr": 0.01, "max_length": 32}
    options |= {"max_steps": 6, "save_steps": 3, "batch_size": GLOBAL_BATCH // world_size()}
    named = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    train.main([*named, "--quiet"])
    return {}


@dataclass(frozen=True)
class Run:
    """``make(folder, *arguments, **options)``."""

    make: Callable[..., Result]
    arguments: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


def _named() -> dict[str, Run]:
    runs = {f"{system} {kind}": Run(data_parallel, (system, kind)) for system in SMALL for kind in TASK_TYPES}
    for name in ("ept", "mixlora", "tucka"):
        runs[f"{name} encoder float32"] = Run(data_parallel, (name, "encoder"), {"dtype": "float32"})
    runs |= {
        "ept encoder, tokens route": Run(data_parallel, ("ept", "encoder"), {"adapter": {"routing": "token"}}),
        "ept encoder, top 1": Run(data_parallel, ("ept", "encoder"), {"adapter": {"top_k": 1}}),
        "ept encoder, own seeds": Run(
            data_parallel, ("ept", "encoder"), {"own_seeds": True, "adapter": {"auto_routing": True}}
        ),
        "tucka encoder, own seeds": Run(data_parallel, ("tucka", "encoder"), {"own_seeds": True}),
        "tucka encoder, single-task batches": Run(data_parallel, ("tucka", "encoder"), {"task_batching": "single"}),
    }
    for kind in TASK_TYPES:
        runs[f"ept {kind}, accumulated"] = Run(data_parallel, ("ept", kind), {"gradient_accumulation_steps": 2})
    for value in (None, True):
        options = {"ddp_find_unused_parameters": value}
        runs[f"ept encoder, find_unused {value}"] = Run(data_parallel, ("ept", "encoder"), options)
    for system in SMALL:
        started = {"started": True} if system == "tucka" else {}
        runs[f"{system} encoder FSDP2"] = Run(sharded, (system, "encoder"), started)
        runs[f"{system} encoder checkpointed"] = Run(checkpointed, (system, "encoder"))
        for kind in ("causal", "seq2seq"):
            runs[f"{system} {kind} checkpointed"] = Run(checkpointed, (system, kind))
    runs |= {
        "ept causal FSDP2": Run(sharded, ("ept", "causal")),
        "tucka encoder FSDP2, not started": Run(sharded, ("tucka", "encoder")),
        "ept blocks fully_shard": Run(own_loop, ("ept",)),
        "mixlora blocks fully_shard": Run(own_loop, ("mixlora",)),
        "ept blocks FSDP1": Run(own_loop, ("ept",), {"version": 1}),
        "more blocks FSDP1": Run(own_loop, ("more",), {"version": 1}),
        "unused": Run(unused),
        "ept-train": Run(command_line),
    }
    return runs


RUNS = _named()


def perform(name: str, folder: Path) -> Result:
    """The result of a run in this process; ``error``, a text, is all there is of a refusal."""
    run = RUNS[name]
    if world_size() > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
    try:
        return run.make(folder / name.replace(" ", "-"), *run.arguments, **run.options)
    except ValueError as error:
        return {"error": str(error)}


def main(output: str, *names: str) -> None:
    folder = Path(output)
    for name in names:
        result = perform(name, folder)
        torch.save(result, folder / f"{name}.{rank()}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
    gc.collect()  # no reducer may be the last to hold the group, see tests/baselines/test_tucka_router.py
    if dist.is_initialized():
        dist.destroy_process_group()
