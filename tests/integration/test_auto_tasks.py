"""``task_ids="auto"``: a model finds out the tasks of unlabelled samples."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

import ept
from ept.prototypes import TaskPrototypes

from .conftest import CASES, TASKS, VOCABULARY, Case, adapted

TEXT = [name for name in CASES if name != "vit"]


def typical(case: Case, tasks: list[int], length: int = 9) -> dict[str, torch.Tensor]:
    """A batch in which a sample of task t has three tokens of its own; some positions are padding."""
    third = VOCABULARY // 3
    ids = torch.stack([torch.randint(3, 6, (length,)) + task * third for task in tasks])
    mask = torch.ones_like(ids)
    mask[1:, -3:] = 0
    batch = {"input_ids": ids.masked_fill(mask == 0, 2 * third + 1), "attention_mask": mask}
    if case.task_type == "SEQ_2_SEQ_LM":
        batch["decoder_input_ids"] = torch.randint(3, VOCABULARY, (len(tasks), 5))
    return batch


def trained(case: Case, **overrides: object) -> peft.PeftModel:
    model = adapted(case, case.build(), auto_routing=True, **overrides)
    model.train()
    with torch.no_grad():
        for _ in range(6):
            tasks = torch.randint(3, (16,)).tolist()
            model(**typical(case, tasks), task_ids=tasks)
    return model.eval()


@pytest.fixture(params=TEXT)
def text(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(1234)
    return CASES[request.param]


def test_finds_the_task_of_every_sample(text: Case) -> None:
    model, tasks = trained(text), [2, 0, 1, 1]
    batch = typical(text, tasks)
    mixture = model.infer_tasks(**batch)
    assert mixture.most_likely().tolist() == tasks
    torch.testing.assert_close(mixture.weights.sum(1), torch.ones(4))
    with torch.no_grad():
        auto = model(**batch, task_ids="auto").logits
        torch.testing.assert_close(auto, model(**batch, task_ids=mixture).logits, rtol=0, atol=0)
        torch.testing.assert_close(auto, model(**batch, task_ids=tasks).logits, rtol=0.05, atol=0.05)
        with ept.use_tasks("auto"):
            assert torch.equal(model(**batch).logits, auto)
        half = model(**batch, task_ids=["gamma", "auto", 1, "auto"]).logits
    torch.testing.assert_close(half[[1, 3]], auto[[1, 3]], atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(half[[0, 2]], model(**batch, task_ids=tasks).logits[[0, 2]], atol=1e-5, rtol=1e-4)


def test_a_one_hot_mixture_is_its_ids(case: Case) -> None:
    model = adapted(case, case.build())
    batch, ids = case.batch(), torch.tensor([2, 0, 1])
    one_hot = ept.TaskMixture(nn.functional.one_hot(ids, 3).float())
    with torch.no_grad():
        expected, found = model(**batch, task_ids=ids).logits, model(**batch, task_ids=one_hot).logits
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.generates])
@pytest.mark.parametrize("beams", [1, 3])
def test_the_prompt_decides_for_the_whole_generation(name: str, beams: int) -> None:
    torch.manual_seed(5)
    case = CASES[name]
    model, tasks = trained(case), [1, 2, 0]
    batch = typical(case, tasks)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])  # a decoder wants its padding on the left
    settings = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False}
    expected = model.generate(**inputs, task_ids=model.infer_tasks(**inputs), **settings)
    assert torch.equal(model.generate(**inputs, task_ids="auto", **settings), expected)
    with ept.use_tasks("auto"):
        assert torch.equal(model.generate(**inputs, **settings), expected)


def test_is_saved_with_the_adapter(text: Case, tmp_path: Path) -> None:
    base = text.build()
    model = adapted(text, copy.deepcopy(base), auto_routing=True)
    model.train()
    with torch.no_grad():
        model(**typical(text, [0, 1, 2, 2]), task_ids=[0, 1, 2, 2])
    model.eval().save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    batch = typical(text, [2, 1])
    assert torch.equal(loaded.infer_tasks(**batch).weights, model.infer_tasks(**batch).weights)
    with torch.no_grad():
        assert torch.equal(loaded(**batch, task_ids="auto").logits, model(**batch, task_ids="auto").logits)


def test_can_be_learned_afterwards(text: Case) -> None:
    model = adapted(text, text.build())
    batch = typical(text, [0, 1, 2])
    with pytest.raises(ValueError, match=r"trained without auto_routing=True; call model.learn_auto_routing"):
        model(**batch, task_ids="auto")
    names = ["alpha", "beta", "gamma", 2] * 4
    model.learn_auto_routing({**typical(text, [0, 1, 2, 2] * 4), "task_ids": names} for _ in range(6))
    assert model.infer_tasks(**batch).most_likely().tolist() == [0, 1, 2]
    assert model.peft_config["default"].auto_routing


def test_trains_and_passes_gradients(text: Case) -> None:
    model = trained(text)
    batch = typical(text, [0, 1, 2])
    before = model.base_model.ept_task_tables["default"].prototypes.count.clone()
    for mode in (False, True):
        model.train(mode).zero_grad()
        loss = model(**batch, task_ids="auto").logits.square().mean()
        if mode:
            assert ept.contrastive_loss(model) == 0, "a guess is no label"
        loss.backward()
        grads = [p.grad for n, p in model.named_parameters() if ".kernels." in n and p.grad is not None]
        assert grads
        assert all(torch.isfinite(grad).all() for grad in grads)
    assert torch.equal(model.base_model.ept_task_tables["default"].prototypes.count, before), "a guess is no label"


@pytest.mark.filterwarnings("ignore:Logical operators:DeprecationWarning")
def test_compiles_in_one_graph() -> None:
    torch._dynamo.reset()
    case = CASES["bert"]
    torch.manual_seed(3)
    model = trained(case)
    batch = typical(case, [0, 2, 1])
    with torch.no_grad():
        expected = model(**batch, task_ids="auto").logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(**batch, task_ids="auto").logits, expected, atol=1e-5, rtol=1e-4)


def test_errors_name_what_is_wrong() -> None:
    case = CASES["bert"]
    model = adapted(case, case.build(), auto_routing=True)
    batch = typical(case, [0, 1, 2])
    with pytest.raises(ValueError, match="no sample of any task has been observed yet"):
        model(**batch, task_ids="auto")
    model.learn_auto_routing([{**batch, "task_ids": [0, 1, 2]}])
    with pytest.raises(ValueError, match="one id for each of the 3 samples, got 2"):
        model(**batch, task_ids=["auto", 1])
    with pytest.raises(ValueError, match="unknown task 'delta'"):
        model(**batch, task_ids=["auto", 1, "delta"])
    with pytest.raises(ValueError, match="mixes 2 tasks, but there are 3"):
        model(**batch, task_ids=ept.TaskMixture(torch.ones(3, 2)))
    with pytest.raises(ValueError, match="'auto' is for calls of a whole adapted model"):
        model.merge_adapter(task="auto")
    model.merge_adapter(task=1)
    with pytest.raises(ValueError, match="task 1 is merged into the weights; unmerge it first"):
        model(**batch, task_ids="auto")
    with pytest.raises(ValueError, match="got a mixture of tasks"):
        model(**batch, task_ids=ept.TaskMixture(torch.ones(3, 3) / 3))


def test_a_model_without_token_embeddings_is_refused() -> None:
    case = CASES["vit"]
    with pytest.raises(ValueError, match="auto_routing: ViTForImageClassification has no layer of token embeddings"):
        peft.get_peft_model(case.build(), case.config(auto_routing=True))


@pytest.mark.parametrize("config", [ept.MoREConfig, ept.MOELoRAConfig, ept.DCFTConfig, ept.MixLoRAConfig])
def test_other_methods_say_that_they_do_not(config: type) -> None:
    case = CASES["llama"]
    model = peft.get_peft_model(
        case.build(), config(task_names=TASKS, task_type="CAUSAL_LM", target_modules="all-linear")
    )
    with pytest.raises(ValueError, match="'auto' is not supported by"):
        model(**case.batch(), task_ids="auto")


@pytest.mark.parametrize("config", [ept.MoREConfig, ept.MOELoRAConfig])
def test_other_methods_take_mixtures(config: type) -> None:
    case = CASES["llama"]
    model = peft.get_peft_model(
        case.build(), config(task_names=TASKS, task_type="CAUSAL_LM", target_modules=["q_proj"])
    )
    for name, parameter in model.named_parameters():
        if ".B" in name:
            nn.init.normal_(parameter)
    batch, ids = case.batch(), torch.tensor([2, 0, 1])
    one_hot = ept.TaskMixture(nn.functional.one_hot(ids, 3).float())
    with torch.no_grad():
        expected = model.eval()(**batch, task_ids=ids).logits
        torch.testing.assert_close(model(**batch, task_ids=one_hot).logits, expected, atol=1e-6, rtol=1e-6)


def test_the_statistics_are_those_of_all_samples() -> None:
    torch.manual_seed(0)
    prototypes, z, tasks = TaskPrototypes(3, 5), torch.randn(37, 5) * 3 + 20, torch.randint(2, (37,))
    for start, end in ((0, 1), (1, 20), (20, 20), (20, 37)):
        prototypes.observe(z[start:end], tasks[start:end])
    prototypes.observe(z[:4], 1)
    z, tasks = torch.cat([z, z[:4]]), torch.cat([tasks, torch.ones(4, dtype=torch.long)])
    for task in range(2):
        own = z[tasks == task]
        assert prototypes.count[task] == len(own)
        torch.testing.assert_close(prototypes.mean[task], own.mean(0), atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(prototypes.variance[task], own.var(0, correction=0), atol=1e-3, rtol=1e-4)
    weights = prototypes.mixture(z, 0.05).weights
    assert (weights[:, 2] == 0).all(), "nothing is known of the third task"
    torch.testing.assert_close(weights.sum(1), torch.ones(len(z)))
