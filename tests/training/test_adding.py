"""``ept.training.add_task``: an adapter's embedding and a head for a task that comes later."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model

import ept
from ept.data import TaskData
from ept.training import EPTTrainer, EPTTrainingArguments, MultiTaskEncoder, add_task


def test_a_task_is_added_with_a_head_and_nothing_else_moves(
    toys: SimpleNamespace, tasks: list[TaskData], choice_task: TaskData, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    first, new = tasks[:2], tasks[2]
    names = [task.spec.name for task in first]
    base = MultiTaskEncoder(toys.make_base("encoder"), [task.spec for task in first])
    config = ept.EPTConfig(
        r=2,
        kernel_sizes=(2, 2, 4),
        task_names=names,
        target_modules=["query", "value"],
        modules_to_save=["heads"],
        auto_routing=True,
    )
    model, tokenizer = get_peft_model(base, config), toys.make_tokenizer("encoder")
    ids = torch.randint(5, 19, (4, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def fit(chosen: list[TaskData]) -> None:
        options = EPTTrainingArguments(
            str(tmp_path / "run"),
            max_steps=3,
            per_device_train_batch_size=8,
            weight_decay=0.5,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        EPTTrainer(model, options, tasks=chosen, processing_class=tokenizer).train()
        model.eval()

    def outputs() -> list[torch.Tensor]:
        with torch.no_grad():
            return [model(**batch, task_ids=task).logits[:, : first[task].spec.num_labels] for task in (0, 1)]

    fit(first)
    before = outputs()
    with pytest.raises(ValueError, match="multiple choice"):
        add_task(model, choice_task.spec)
    assert add_task(model, new.spec, like=1) == 2
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.rpartition("default.")[2] for name in trained} == {
        "weight_added",
        "by_task.head_degree.weight",
        "by_task.head_degree.bias",
    }
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if name in trained}
    fit([new])
    after = dict(model.named_parameters())
    assert not any(torch.equal(after[name], value) for name, value in values.items())
    assert all(torch.equal(*pair) for pair in zip(outputs(), before, strict=True))
    with torch.no_grad():
        auto = model(**batch, task_ids="auto", head_ids=2).logits
        assert model(**batch, task_ids="auto").logits.shape == auto.shape
        wanted = model(**batch, task_ids=2).logits
    model.save_pretrained(tmp_path / "adapter")
    fresh = MultiTaskEncoder(toys.make_base("encoder"), [task.spec for task in tasks])
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch, task_ids="degree").logits, wanted)
