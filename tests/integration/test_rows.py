"""Every row gets its own task's weights, in models of many architectures, or the layer is refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from rows_models import ARCHITECTURES, BATCH, Architecture
from torch import Tensor, nn

import ept

IDS = [2, 0, 1]


def adapted(case: Architecture) -> Any:
    """The model with an adapter whose tasks differ."""
    torch.manual_seed(0)
    options = {"r": 2, "num_tasks": 3, "kernel_sizes": (1, 1, 2, 2), "top_k": 2, **case.options}
    config = ept.EPTConfig(target_modules=case.targets, exclude_modules=case.exclude, **options)
    model = get_peft_model(case.make(), config).eval()
    for name, parameter in model.named_parameters():
        if "ept_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def row(batch: dict[str, Any], sample: int) -> dict[str, Any]:
    return {name: value[sample : sample + 1] for name, value in batch.items()}


def result(output: Any) -> Tensor:
    """What a model gives for each sample, ``[batch, ...]``."""
    if isinstance(output, Tensor):
        return output
    if getattr(output, "text_embeds", None) is not None:  # CLIP compares every text with every image
        return torch.cat([output.text_embeds, output.image_embeds], -1)
    return output.logits if getattr(output, "logits", None) is not None else output.last_hidden_state


def gradients(model: nn.Module, outputs: list[Tensor]) -> dict[str, Tensor]:
    loss = torch.stack([output.float().square().sum() for output in outputs]).sum()
    model.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if "ept_" in name and p.grad is not None}
    assert found
    return found


@pytest.mark.parametrize(
    ("name", "length"), [(name, length) for name, case in ARCHITECTURES.items() for length in case.lengths]
)
def test_a_mixed_batch_is_its_rows_alone_or_refused(name: str, length: int) -> None:
    case = ARCHITECTURES[name]
    model = adapted(case)
    batch = case.batch(length)
    if case.refused is not None:
        with pytest.raises(ValueError, match=case.refused) as error:
            model(**batch, task_ids=IDS)
        assert "in layer '" in str(error.value)
        model(**batch, task_ids=[1] * BATCH)  # equal ids are one task for all
        model(**batch, task_ids=torch.tensor([1] * BATCH))
        return
    mixed = result(model(**batch, task_ids=IDS))
    alone = [result(model(**row(batch, sample), task_ids=task)) for sample, task in enumerate(IDS)]
    other = result(model(**row(batch, 0), task_ids=IDS[1]))
    size = torch.cat(alone).abs().max()
    torch.testing.assert_close(mixed / size, torch.cat(alone) / size, atol=1e-4, rtol=0)
    assert (other - alone[0]).abs().max() > 1e-2 * size  # tasks differ, or nothing is tested
    wanted = gradients(model, alone)
    given = gradients(model, [result(model(**batch, task_ids=IDS))])
    assert given.keys() == wanted.keys()
    for key, value in wanted.items():
        scale = max(1.0, float(value.abs().max()))
        torch.testing.assert_close(
            given[key] / scale, value / scale, atol=2e-4, rtol=1e-3, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("name", [name for name, case in ARCHITECTURES.items() if case.generates])
def test_a_mixed_generation_is_its_rows_alone(name: str, options: dict[str, Any]) -> None:
    model = adapted(ARCHITECTURES[name])
    batch = {key: value for key, value in ARCHITECTURES[name].batch(6).items() if not key.startswith("decoder")}
    arguments = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0, **options}
    mixed = model.generate(**batch, **arguments, task_ids=IDS)
    alone = [model.generate(**row(batch, sample), **arguments, task_ids=task) for sample, task in enumerate(IDS)]
    assert torch.equal(mixed, torch.cat(alone))


@pytest.mark.parametrize("name", ["NLLB-MoE", "Switch", "hand-written experts"])
def test_an_expert_that_gets_as_many_tokens_as_there_are_samples(name: str) -> None:
    """Six tokens among few experts: one of them often gets three, the number of ids."""
    model = adapted(ARCHITECTURES[name])
    with torch.no_grad():
        for _ in range(4):
            batch = ARCHITECTURES[name].batch(2)
            mixed = result(model(**batch, task_ids=IDS))
            alone = [result(model(**row(batch, sample), task_ids=task)) for sample, task in enumerate(IDS)]
            torch.testing.assert_close(mixed, torch.cat(alone), atol=1e-4, rtol=1e-4)


# --- generation that goes on with some of the samples -----------------------------------------------------------------


def whisper() -> Any:
    model = adapted(ARCHITECTURES["Whisper"])
    settings = model.base_model.model.generation_config
    for name, value in {"no_timestamps_token_id": 40, "is_multilingual": False, "pad_token_id": 1}.items():
        setattr(settings, name, value)
    return model


def test_long_recordings_of_several_tasks_keep_theirs_when_others_end() -> None:
    model = whisper()
    recordings = torch.randn(BATCH, 8, 64)  # windows of 16
    lengths = torch.tensor([16, 64, 48])
    mask = (torch.arange(64) < lengths[:, None]).long()
    arguments = {"max_new_tokens": 4, "do_sample": False, "return_timestamps": True}
    mixed = model.generate(input_features=recordings, attention_mask=mask, **arguments, task_ids=IDS)
    alone = [
        model.generate(
            input_features=recordings[i : i + 1, :, : lengths[i]],
            attention_mask=mask[i : i + 1, : lengths[i]],
            **arguments,
            task_ids=task,
        )[0]
        for i, task in enumerate(IDS)
    ]
    for given, wanted in zip(mixed, alone, strict=True):
        assert given[: len(wanted)].tolist() == wanted.tolist()


@pytest.mark.parametrize("threshold", [-1.0, -2.5, -3.0, -3.5, 0.0])
def test_recordings_that_are_decoded_again_keep_their_tasks(threshold: float) -> None:
    """Whisper falls back to the next temperature for those of low probability; both are 0, so that nothing is drawn."""
    model = whisper()
    torch.manual_seed(2)
    recordings = torch.randn(BATCH, 8, 64)
    arguments = {
        "max_new_tokens": 4, "return_timestamps": True, "temperature": (0.0, 0.0), "logprob_threshold": threshold,
    }  # fmt: skip
    mask = torch.ones(BATCH, 64, dtype=torch.long)
    mixed = model.generate(input_features=recordings, attention_mask=mask, **arguments, task_ids=IDS)
    for i, task in enumerate(IDS):
        one = {"input_features": recordings[i : i + 1], "attention_mask": mask[i : i + 1]}
        alone = model.generate(**one, **arguments, task_ids=task)[0]
        assert mixed[i][: len(alone)].tolist() == alone.tolist()


def test_other_rows_than_a_generation_announced_are_refused() -> None:
    model = adapted(ARCHITECTURES["Llama"])
    tuner = ept.tuner.model.ept_model(model)
    ids = torch.randint(5, 64, (6, 4))
    with tuner.generating(torch.tensor(IDS), 3, copies=2):
        model(input_ids=ids)  # beams
        with pytest.raises(ValueError, match="one id for each of the 5 rows that generate runs, got 3 and 2 announced"):
            model(input_ids=ids[:5])
    with tuner.generating([1, 1, 1], 3):
        model(input_ids=ids[:5])


# --- packed samples ---------------------------------------------------------------------------------------------------


def packed() -> tuple[list[Tensor], dict[str, Tensor]]:
    torch.manual_seed(1)
    samples = [torch.randint(5, 64, (1, length)) for length in (3, 5, 4)]
    positions = torch.cat([torch.arange(sample.shape[1]) for sample in samples])[None]
    return samples, {"input_ids": torch.cat(samples, 1), "position_ids": positions}


PER_TOKEN = [2] * 3 + [0] * 5 + [1] * 4


@pytest.mark.parametrize(
    "ids",
    [IDS, torch.tensor(IDS), PER_TOKEN, torch.tensor([PER_TOKEN]), [PER_TOKEN], ["c", "a", "b"]],
    ids=["list", "tensor", "tokens", "tensor of tokens", "lists of tokens", "names"],
)
def test_packed_samples_get_their_own_tasks(ids: object) -> None:
    case = ARCHITECTURES["Llama"]
    case = Architecture(case.kind, case.make, case.batch, options={"task_names": ["a", "b", "c"], "num_tasks": 3})
    model = adapted(case)
    samples, batch = packed()
    wanted = torch.cat(
        [model(input_ids=sample, task_ids=task).logits for sample, task in zip(samples, IDS, strict=True)], 1
    )
    torch.testing.assert_close(model(**batch, task_ids=ids).logits, wanted, atol=1e-5, rtol=1e-4)


def test_lengths_tell_packed_samples_apart_too() -> None:
    model = adapted(ARCHITECTURES["Llama"])
    _, batch = packed()
    ends = torch.tensor([0, 3, 8, 12], dtype=torch.int32)
    by_ends = model(**batch, cu_seq_lens_q=ends, task_ids=IDS).logits
    assert torch.equal(by_ends, model(**batch, task_ids=IDS).logits)
    with pytest.raises(ValueError, match="one id for each of the 3 packed samples, got 2"):
        model(**batch, cu_seq_lens_q=ends, task_ids=[0, 1])
    with pytest.raises(ValueError, match="packed samples that position_ids tell apart, got 2 ids"):
        model(**batch, task_ids=[0, 1])
    with pytest.raises(ValueError, match="one id for each of the 1 samples, got 2; samples that are packed"):
        model(input_ids=batch["input_ids"], task_ids=[0, 1])
    with pytest.raises(ValueError, match=r"of the shape of the tokens of the batch \[1, 12\], got \[1, 11\]"):
        model(**batch, task_ids=torch.tensor([PER_TOKEN])[:, 1:])


def mean_loss_of(model: nn.Module, samples: Sequence[Tensor], tasks: Sequence[int]) -> Tensor:
    """The contrastive loss of every sample in a call of its own, averaged."""
    losses = []
    for sample, task in zip(samples, tasks, strict=True):
        model(input_ids=sample, task_ids=[task])
        losses.append(ept.contrastive_loss(model))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("ids", [IDS, torch.tensor([PER_TOKEN])], ids=["samples", "tokens"])
def test_the_contrastive_loss_of_packed_samples_is_that_of_the_samples(ids: object) -> None:
    model = adapted(ARCHITECTURES["Llama"]).train()
    samples, batch = packed()
    model(**batch, task_ids=ids)
    given = ept.contrastive_loss(model)
    torch.testing.assert_close(given, mean_loss_of(model, samples, IDS), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("by", ["samples", "tokens", "tokens and lengths"])
def test_packed_samples_of_one_task_count_once_each_in_the_contrastive_loss(by: str) -> None:
    model = adapted(ARCHITECTURES["Llama"]).train()
    samples, batch = packed()
    tasks = [1, 1, 0]
    ids: Any = tasks if by == "samples" else torch.tensor([[1] * 8 + [0] * 4])
    ends = {"cu_seq_lens_q": torch.tensor([0, 3, 8, 12], dtype=torch.int32)} if by == "tokens and lengths" else {}
    model(**batch, **ends, task_ids=ids)
    given = ept.contrastive_loss(model)
    torch.testing.assert_close(given, mean_loss_of(model, samples, tasks), atol=1e-5, rtol=1e-4)


def test_ids_of_tokens_are_refused_by_an_encoder_decoder() -> None:
    model = adapted(ARCHITECTURES["T5"])
    with pytest.raises(ValueError, match="one a sample: an encoder-decoder has tokens of two kinds"):
        model(**ARCHITECTURES["T5"].batch(6), task_ids=torch.zeros(BATCH, 6, dtype=torch.long))


# --- looking for rows that are wrong ----------------------------------------------------------------------------------


def test_check_rows_names_the_layers_that_differ() -> None:
    case = ARCHITECTURES["a sequence first that nothing declares"]
    model = adapted(Architecture(case.kind, case.make, case.batch, options={"row_layout": {"mix": "batch_first"}}))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = ept.check_rows(model, case.batch(BATCH))  # as long as the batch: wrong, and no shape tells
    assert list(found) == ["mix", "output"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert ept.check_rows(adapted(ARCHITECTURES["a sequence first, declared"]), case.batch(BATCH)) == {}
    with pytest.raises(ValueError, match="in layer 'mix'"):
        ept.check_rows(adapted(case), case.batch(BATCH))


def test_check_rows_needs_several_samples() -> None:
    model = adapted(ARCHITECTURES["Llama"])
    with pytest.raises(ValueError, match="at least 2 samples"):
        ept.check_rows(model, {"input_ids": torch.ones(1, 3, dtype=torch.long)})


@pytest.mark.parametrize("method", [ept.MOELoRAConfig, ept.MoREConfig])
@pytest.mark.parametrize("name", ["XLNet", "DeBERTa-v3", "Switch", "OPT"])
def test_the_baselines_follow_the_same_rule(method: Any, name: str) -> None:
    torch.manual_seed(0)
    case = ARCHITECTURES[name]
    sizes = {"r": 4, "num_experts": 2} if method is ept.MOELoRAConfig else {"r": 4}
    model = get_peft_model(case.make(), method(num_tasks=3, target_modules="all-linear", **sizes))
    assert ept.check_rows(model, case.batch(6)) == {}
    assert ept.check_rows(model, case.batch(3)) == {}


def test_a_model_comes_out_of_its_adapter_as_it_was() -> None:
    for name in ("Switch", "DeBERTa-v3", "Whisper"):
        model = adapted(ARCHITECTURES[name]).unload()
        changed = [key for part in model.modules() for key in part.__dict__ if key in ("forward", "generate")]
        assert not changed
        assert not any("Sample" in type(value).__name__ for part in model.modules() for value in part.__dict__.values())


def test_the_documentation_has_a_line_for_every_architecture() -> None:
    table = (Path(__file__).parents[2] / "docs" / "rows.md").read_text()
    for name, case in ARCHITECTURES.items():
        (line,) = (line for line in table.splitlines() if line.startswith(f"| {name} |"))
        assert f"| {case.kind} |" in line
        assert ("refused" in line) == (case.refused is not None)
