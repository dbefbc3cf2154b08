"""The collator and the mixin that make any trainer right, and the losses that a plain one adds by hand."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import Trainer, default_data_collator

import ept
from ept.training import EPTTrainer, EPTTrainingArguments

TASKS = ["first", "second", "third"]


def rows(count: int = 16, *, task: str = "task", length: int = 7) -> datasets.Dataset:
    """Rows of one length, most of them of the first task."""
    tokens = torch.randint(5, 60, (count, length), generator=torch.Generator().manual_seed(0)).tolist()
    named = [TASKS[max(0, place - count + 3)] for place in range(count)]
    return datasets.Dataset.from_list(
        [{"input_ids": ids, "labels": ids, "attention_mask": [1] * length, task: name}
         for ids, name in zip(tokens, named, strict=True)]
    )  # fmt: skip


def base(kind: str = "causal") -> nn.Module:
    transformers.set_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    if kind == "causal":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2))
    config = transformers.T5Config(
        vocab_size=64,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    return transformers.T5ForConditionalGeneration(config)


def adapted(kind: str = "causal", **options: Any) -> peft.PeftModel:
    targets = ["q_proj", "v_proj"] if kind == "causal" else ["q", "v"]
    options = {"r": 2, "task_names": TASKS, "kernel_sizes": (2, 4), "target_modules": targets, **options}
    model = base(kind)
    transformers.set_seed(0)
    return peft.get_peft_model(model, ept.EPTConfig(**options))


def arguments(folder: Path, kind: type = transformers.TrainingArguments, **options: Any) -> Any:
    given = {
        "max_steps": 1, "per_device_train_batch_size": 16, "logging_steps": 1, "report_to": "none", "use_cpu": True,
        "save_strategy": "no", "disable_tqdm": True, "seed": 0, "lr_scheduler_type": "constant", "learning_rate": 1e-3,
    }  # fmt: skip
    return kind(output_dir=str(folder), **{**given, **options})


class Mixed(ept.EPTTrainerMixin, Trainer):
    pass


def first_loss(trainer: Trainer) -> float:
    trainer.train()
    return trainer.state.log_history[0]["loss"]


# ---- the collator


def test_names_become_ids_whatever_the_collator_drops() -> None:
    collate = ept.TaskCollator(lambda batch: {"input_ids": torch.tensor([row["input_ids"] for row in batch])}, TASKS)
    data = rows()
    batch = collate([data[place] for place in (0, 14, 15)])
    assert batch["task_ids"].tolist() == [0, 1, 2] and "task" not in batch


def test_a_pair_of_answers_has_its_task_twice() -> None:
    pairs = [{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3], "task_ids": task} for task in (2, 0)]
    collate = ept.TaskCollator(lambda batch: {"input_ids": torch.zeros(2 * len(batch), 2, dtype=torch.long)})
    assert collate(pairs)["task_ids"].tolist() == [2, 0, 2, 0]


def test_packed_rows_that_are_laid_in_one_give_every_token_its_task() -> None:
    packed = [
        {"input_ids": [5, 6, 7], "seq_lengths": [1, 2], "task": "second"},
        {"input_ids": [8, 9], "seq_lengths": [2], "task": "first"},
    ]
    collate = ept.TaskCollator(
        lambda batch: {"input_ids": torch.tensor([[i for row in batch for i in row["input_ids"]]])}, TASKS
    )
    assert collate(packed)["task_ids"].tolist() == [[1, 1, 1, 0, 0]]


@pytest.mark.parametrize(
    ("row", "names", "message"),
    [
        ({"input_ids": [1]}, TASKS, "a row has no task: 'task_ids' is missing, there is input_ids"),
        (
            {"input_ids": [1], "task": "fourth"},
            TASKS,
            "'fourth', which is no task: task_names are first, ",
        ),
        ({"input_ids": [1], "task": "first"}, None, "'first', which is no task: task_names is None"),
    ],
)
def test_a_row_without_a_known_task_is_refused(row: dict, names: list[str] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ept.TaskCollator(default_data_collator, names)([row])


# ---- losses by hand


class ByHand(Trainer):
    """What a user of a plain trainer writes."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **options: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **options)
        loss = loss + ept.auxiliary_loss(model)
        return (loss, outputs) if return_outputs else loss


def by_hand(folder: Path, size: int, count: int) -> ByHand:
    given = arguments(
        folder, per_device_train_batch_size=size, gradient_accumulation_steps=count, remove_unused_columns=False
    )
    collate = ept.TaskCollator(default_data_collator, TASKS)
    return ByHand(adapted(contrastive_weight=2.0), given, train_dataset=rows(), data_collator=collate)


def test_own_losses_count_once_a_step_however_it_is_divided(tmp_path: Path) -> None:
    whole, parts = (first_loss(by_hand(tmp_path / str(size), size, 16 // size)) for size in (16, 4))
    assert abs(whole - parts) < 1e-4
    mixed = Mixed(adapted(contrastive_weight=0.0), arguments(tmp_path), train_dataset=rows())
    assert whole > first_loss(mixed) + 0.5  # the loss is there


def test_own_losses_are_zero_in_evaluation(tmp_path: Path) -> None:
    model = adapted(contrastive_weight=2.0)
    batch = {"input_ids": torch.tensor(rows()["input_ids"][:4]), "task_ids": torch.tensor([0, 1, 2, 0])}
    model.train()(**batch)
    assert ept.auxiliary_loss(model) > 0
    model.eval()(**batch)
    assert ept.auxiliary_loss(model) == 0


def test_a_pass_of_the_base_alone_leaves_the_losses_of_the_adapted_one() -> None:
    model = adapted(contrastive_weight=2.0).train()
    batch = {"input_ids": torch.tensor(rows()["input_ids"][:4]), "task_ids": torch.tensor([0, 1, 2, 0])}
    model(**batch)
    before = ept.auxiliary_loss(model)
    with torch.no_grad(), model.disable_adapter():
        model(**batch)
    assert ept.auxiliary_loss(model) == before > 0


# ---- the mixin


def weights_after(trainer: Trainer) -> dict[str, Tensor]:
    trainer.train()
    return {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_accumulated_batches_train_as_one(tmp_path: Path, kind: str) -> None:
    trainers = [
        Mixed(
            adapted(kind, contrastive_weight=2.0),
            arguments(tmp_path / str(size), per_device_train_batch_size=size, gradient_accumulation_steps=16 // size),
            train_dataset=rows(),
        )
        for size in (16, 4)
    ]
    one, four = (first_loss(trainer) for trainer in trainers)
    assert one == pytest.approx(four, abs=1e-4)


def test_it_trains_as_the_trainer_of_this_package(tmp_path: Path) -> None:
    mixed = Mixed(adapted(), arguments(tmp_path, warmup_steps=0, max_steps=2), train_dataset=rows())
    given = arguments(tmp_path, EPTTrainingArguments, warmup_steps=0, max_steps=2)
    own = EPTTrainer(adapted(), given, train_dataset=rows())
    assert {group["name"] for group in mixed.create_optimizer().param_groups} >= {"kernels", "gates of width 16"}
    mixed.optimizer = None
    first, second = weights_after(mixed), weights_after(own)
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=1e-6)
    assert own.state.log_history[0]["contrastive_loss"] > 0


def test_every_task_is_drawn_alike_and_scored_by_itself(tmp_path: Path) -> None:
    data = rows(64)
    trainer = Mixed(adapted(), arguments(tmp_path), train_dataset=data, eval_dataset=data)
    drawn = np.array([TASKS.index(data[int(place)]["task"]) for place in trainer._get_train_sampler()])
    assert (np.bincount(drawn, minlength=3) > 12).all()
    metrics = trainer.evaluate()
    losses = [metrics[f"eval_{task}_loss"] for task in TASKS]
    assert metrics["eval_loss"] == pytest.approx(np.mean(losses)) and len(set(losses)) == 3


def test_ids_in_the_rows_and_one_task_serve_as_well(tmp_path: Path) -> None:
    ids = rows().map(lambda row: {"task_ids": TASKS.index(row["task"])}, remove_columns="task")
    assert first_loss(Mixed(adapted(), arguments(tmp_path), train_dataset=ids)) > 0
    single = adapted(task_names=["first"])
    assert first_loss(Mixed(single, arguments(tmp_path), train_dataset=rows().remove_columns("task"))) > 0


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "seq2seq", "label_smoothing_factor is 0.1, which is not served with an enc"),
        ({"train_sampling_strategy": "group_by_length"}, "causal", "train_sampling_strategy is 'group_by_length'"),
    ],
)
def test_an_option_that_is_not_served_is_refused(tmp_path: Path, options: dict, kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixed(adapted(kind), arguments(tmp_path, **options), train_dataset=rows())


def test_a_row_of_an_unknown_task_is_refused(tmp_path: Path) -> None:
    wrong = rows().map(lambda row: {"task": "fourth"})
    trainer = Mixed(adapted(), arguments(tmp_path), train_dataset=wrong)
    with pytest.raises(ValueError, match="'fourth', which is none of the tasks"):
        trainer.train()


@pytest.mark.parametrize(
    ("removes", "message"),
    [
        (True, "Trainer has probably dropped .*remove_unused_columns=True or in its collator, default_data_collator"),
        (False, "Trainer has probably dropped .* in its collator, <lambda>"),
    ],
)
def test_a_lost_column_is_traced(tmp_path: Path, removes: bool, message: str) -> None:
    data = rows().rename_column("task", "task_ids")
    keep: Callable = lambda batch: {"input_ids": torch.tensor([row["input_ids"] for row in batch])}  # noqa: E731
    collate = {} if removes else {"data_collator": keep}
    trainer = Trainer(adapted(), arguments(tmp_path, remove_unused_columns=removes), train_dataset=data, **collate)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_a_recipe_that_is_lost_is_told_once(tmp_path: Path) -> None:
    """Fifty passes of a plain trainer; the mixin, and a loop that follows the recipe, get no warning."""
    data = rows(task="task_ids").map(lambda row: {"task_ids": TASKS.index(row["task_ids"])})
    given = arguments(tmp_path, max_steps=120, per_device_train_batch_size=1, remove_unused_columns=False)
    with pytest.warns(RuntimeWarning, match=r"without ept.auxiliary_loss and ept.parameter_groups") as seen:
        Trainer(adapted(), given, train_dataset=data).train()
    assert len([warning for warning in seen if "ept.auxiliary_loss" in str(warning.message)]) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="EPT has trained")
        Mixed(adapted(), given, train_dataset=data).train()


# ---- EPTTrainer


def encoder_trainer(folder: Path, **options: Any) -> EPTTrainer:
    names = {name: options.pop(name) for name in ("tasks", "train_dataset", "processing_class") if name in options}
    return EPTTrainer(adapted(), arguments(folder, EPTTrainingArguments, **options), **names)


def test_tasks_and_plain_datasets_are_one_or_the_other(tmp_path: Path, tasks: Any, tokenizer: Any) -> None:
    specs = [dataclasses.replace(task.spec, name=name) for task, name in zip(tasks, TASKS, strict=False)]
    renamed = [dataclasses.replace(task, spec=spec) for task, spec in zip(tasks, specs, strict=False)]
    given = {"tasks": renamed, "processing_class": tokenizer}
    with pytest.raises(TypeError, match="train_dataset is given beside tasks"):
        encoder_trainer(tmp_path, **given, train_dataset=rows())
    with pytest.raises(TypeError, match="processing_class is missing"):
        encoder_trainer(tmp_path, tasks=renamed)
    for name, value in {"train_sampling_strategy": "group_by_length", "batch_eval_metrics": True}.items():
        with pytest.raises(ValueError, match=f"{name} is {value!r}, which is not served with tasks"):
            encoder_trainer(tmp_path, **given, **{name: value})


# ---- TRL


@pytest.fixture
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{f"w{place}": place for place in range(3, 64)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def words(count: int, start: int) -> str:
    return " ".join(f"w{3 + (start + place) % 60}" for place in range(count))


@pytest.mark.parametrize(
    "options", [{}, {"packing": True, "max_length": 16}, {"padding_free": True, "max_length": None}]
)
def test_sft_trainer(tmp_path: Path, tokenizer: Any, options: dict[str, Any]) -> None:
    trl = pytest.importorskip("trl", reason="needs TRL")

    class Mine(ept.EPTTrainerMixin, trl.SFTTrainer):
        pass

    texts = datasets.Dataset.from_list([{"text": words(6, place), "task": TASKS[place % 3]} for place in range(24)])
    given = arguments(tmp_path, trl.SFTConfig, bf16=False, per_device_train_batch_size=4, **options)
    trainer = Mine(adapted(), args=given, train_dataset=texts, eval_dataset=texts, processing_class=tokenizer)
    seen: list[Any] = []
    trainer.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("task_ids")), with_kwargs=True
    )
    assert first_loss(trainer) > 0
    assert all(isinstance(ids, Tensor) for ids in seen)
    assert {f"eval_{task}_loss" for task in TASKS} <= trainer.evaluate().keys()


def test_dpo_trainer(tmp_path: Path, tokenizer: Any) -> None:
    trl = pytest.importorskip("trl", reason="needs TRL")

    class Mine(ept.EPTTrainerMixin, trl.DPOTrainer):
        pass

    pairs = [
        {"prompt": words(4, place), "chosen": " " + words(4, place), "rejected": " " + words(5, place + 9),
         "task": TASKS[place % 3]}
        for place in range(16)
    ]  # fmt: skip
    losses = {}
    for weight in (0.0, 2.0):
        given = arguments(tmp_path, trl.DPOConfig, bf16=False, per_device_train_batch_size=4)
        data = datasets.Dataset.from_list(pairs)
        model = adapted(contrastive_weight=weight)
        losses[weight] = first_loss(Mine(model, args=given, train_dataset=data, processing_class=tokenizer))
    assert losses[2.0] > losses[0.0] + 0.5  # not lost with the reference pass
