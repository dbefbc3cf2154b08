"""What PEFT's users may expect of any method: each feature works, or is refused by name (``docs/peft.md``)."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    GPTJConfig,
    GPTJForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import ept
from ept.tuner import EPTModel

from .conftest import CASES, TASKS, VOCABULARY, adapted, awaken

BERT, LLAMA = CASES["bert"], CASES["llama"]
METHODS = (ept.EPTConfig, ept.MOELoRAConfig, ept.MoREConfig, ept.MixLoRAConfig, ept.DCFTConfig, ept.TuckAConfig)
every_method = pytest.mark.parametrize("kind", METHODS, ids=lambda kind: kind.__name__)


def _config(kind: Any = ept.EPTConfig, **overrides: Any) -> Any:
    settings = {"task_names": TASKS, "target_modules": "all-linear", "exclude_modules": ["classifier"]}
    return kind(**settings | overrides)


def _shake(model: nn.Module, name: str = "default") -> None:
    """Any values for an adapter: two adapters that nobody trained would be alike."""
    for path, parameter in model.named_parameters():
        if f".{name}." in path and ".ept_" in path:
            nn.init.normal_(parameter, std=0.2)


def _logits(model: nn.Module, batch: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch, **options).logits


def _trains(model: nn.Module, adapter: str, part: str = ".ept_") -> set[bool]:
    return {p.requires_grad for n, p in model.named_parameters() if part in n and f".{adapter}." in n}


# ---- one config for several adapters


@every_method
def test_a_config_serves_several_adapters(kind: Any) -> None:
    torch.manual_seed(0)
    config = _config(kind)
    model = peft.get_peft_model(BERT.build(), config).eval()
    model.add_adapter("second", config)
    assert set(ept.adapters(model, "second")) == set(ept.adapters(model, "default"))
    batch = BERT.batch()
    for name in ("default", "second"):
        _shake(model, name)
        model.set_adapter(name)
        assert torch.isfinite(_logits(model, batch, task_ids=0)).all()
    first, second = (model.base_model.ept_task_tables[name] for name in ("default", "second"))
    assert first is not second


def test_an_added_task_is_no_business_of_others_with_the_same_config(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BERT.config()
    base = BERT.build()
    model, other = (peft.get_peft_model(copy.deepcopy(base), config) for _ in range(2))
    model.add_adapter("second", config)
    model.add_task("delta")
    assert model.peft_config["default"].num_tasks == len(TASKS) + 1
    for untouched in (model.peft_config["second"], other.peft_config["default"], config):
        assert (untouched.num_tasks, untouched.task_names, untouched.finished_tasks) == (len(TASKS), TASKS, 0)
    other.save_pretrained(tmp_path)
    assert ept.task_names(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)) == TASKS


# ---- what trains


def test_loading_an_adapter_leaves_another_as_trainable_as_it_was(tmp_path: Path) -> None:
    base = BERT.build()
    adapted(BERT, base).save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    model.load_adapter(tmp_path, "other", is_trainable=True)
    model.load_adapter(tmp_path, "third")
    for part in ("ept_adapters", "ept_task_tables"):
        assert _trains(model, "other", part) == {True}
        assert _trains(model, "third", part) == _trains(model, "default", part) == {False}


def test_a_frozen_adapter_stays_frozen_when_another_is_added() -> None:
    model = adapted(BERT, BERT.build())
    model.set_requires_grad("default", False)
    model.add_adapter("other", BERT.config())
    assert _trains(model, "default", "ept_adapters") == _trains(model, "default", "ept_task_tables") == {False}


def test_nothing_of_a_disabled_adapter_trains() -> None:
    model = adapted(BERT, BERT.build())
    with model.disable_adapter():
        assert _trains(model, "default") == {False}
        assert model.get_model_status().requires_grad == {"default": False}
    assert _trains(model, "default") == {True}


# ---- which modules


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ".*query", "layers_to_transform": [0]}, "layers_to_transform=.* a regular expression"),
        ({"target_modules": ["query"], "layers_pattern": "layer"}, "layers_pattern='layer' needs layers_to_transform"),
        ({"target_modules": ["query"], "layers_pattern": "layer", "layers_to_transform": []}, "layers_pattern"),
    ],
)
def test_a_restriction_to_layers_without_effect_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ept.EPTConfig(**options)
    with pytest.warns(RuntimeWarning, match=message):  # as in a folder that was saved before it was refused
        ept.EPTConfig(**options, inference_mode=True)


@every_method
def test_all_linear_obeys_layers_to_transform(kind: Any) -> None:
    """With 20 targets and more PEFT shortens their names, with fewer it does not: both."""
    for layers in (2, 4):
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": VOCABULARY}
        base = BertForSequenceClassification(BertConfig(num_hidden_layers=layers, **shape))
        model = peft.get_peft_model(base, _config(kind, layers_to_transform=[1]))
        names = list(ept.adapters(model))
        assert len(names) == 6 and all(".layer.1." in name for name in names)
        model.train()
        loss = model(**BERT.batch(), task_ids=0).logits.square().mean()
        (loss + ept.auxiliary_loss(model)).backward()
        shared = model.base_model.ept_task_tables["default"]
        if kind is ept.MixLoRAConfig:
            assert all(parameter.grad is not None for parameter in shared.parameters())


@every_method
def test_default_targets_may_name_what_the_model_lacks(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mapping = EPTModel.target_module_mapping
    monkeypatch.setitem(mapping, "bert", ["query", "intermediate.dense", "output.dense", "q_proj"])
    config = _config(kind, target_modules=None)
    model = peft.get_peft_model(BERT.build(), config)
    assert ept.adapters(model)
    assert config.target_modules == {"query", "intermediate.dense", "output.dense"}
    monkeypatch.setitem(mapping, "bert", ["q_proj"])
    with pytest.raises(NoMatchingPeftModuleError, match="q_proj"):
        peft.get_peft_model(BERT.build(), _config(kind, target_modules=None))


@pytest.mark.parametrize(
    "options",
    [{"target_modules": ["nonsense"]}, {"target_modules": ".*nonsense"}, {"layers_to_transform": [9]}],
    ids=["names", "expression", "layers"],
)
def test_targets_that_match_nothing(options: dict) -> None:
    model = adapted(BERT, BERT.build(), modules_to_save=["classifier"])
    with pytest.raises(NoMatchingPeftModuleError) as caught:
        model.add_adapter("second", BERT.config(**options))
    message = str(caught.value)
    assert "'classifier', 'dense', 'key', 'query', 'value'" in message
    assert "base_layer" not in message and "default" not in message and "original_module" not in message
    assert list(model.peft_config) == ["default"]
    if "layers_to_transform" in options:
        assert "layers_to_transform=[9]" in message


def test_a_kernel_pattern_that_matches_nothing_warns() -> None:
    with pytest.warns(RuntimeWarning, match=r"kernel_pattern keys match no adapted module .*\['quarry'\]"):
        peft.get_peft_model(BERT.build(), BERT.config(kernel_pattern={"quarry": (2, 2), "query": (2, 4)}))


# ---- merging


def _two_adapters() -> peft.PeftModel:
    torch.manual_seed(3)
    model = adapted(BERT, BERT.build(), task_type=None)  # with one, PEFT saves the head, and of one adapter at a time
    model.add_adapter("second", BERT.config(r=2, task_type=None))
    _shake(model, "default")
    _shake(model, "second")
    return model.eval()


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("base_layer.weight")}


def _equal(model: nn.Module, weights: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, weights[name]) for name, tensor in _weights(model).items())


def test_merging_again_warns_and_changes_nothing() -> None:
    model = _two_adapters()
    model.merge_adapter(task="beta")
    merged = _weights(model)
    for options in ({}, {"task": "beta"}, {"task": 1}):
        with pytest.warns(UserWarning, match="already merged, nothing to do"):
            model.merge_adapter(**options)
        assert _equal(model, merged)
    with pytest.raises(ValueError, match="task 1 is already merged"):
        model.merge_adapter(task="alpha")
    assert _equal(model, merged)


def test_adapters_merged_one_after_the_other_are_merged_together() -> None:
    model = _two_adapters()
    before, batch = _weights(model), BERT.batch()
    model.base_model.set_adapter(["default", "second"])
    both = _logits(model, batch, task_ids=1)
    model.merge_adapter(["default", "second"], task=1)
    together = _weights(model)
    model.unmerge_adapter()
    model.merge_adapter(["default"], task=1)
    with pytest.warns(UserWarning, match="additionally merging second"):
        model.merge_adapter(["second"])
    assert _equal(model, together)
    torch.testing.assert_close(_logits(model, batch), both, atol=1e-4, rtol=1e-3)
    assert model.get_model_status().merged_adapters == ["default", "second"]
    model.unmerge_adapter()
    assert _equal(model, before)


def test_unloading_merges_what_is_not_merged_yet() -> None:
    model = _two_adapters()
    batch = BERT.batch()
    model.base_model.set_adapter(["default", "second"])
    both = _logits(model, batch, task_ids=1)
    model.merge_adapter(["default"], task=1)
    plain = model.merge_and_unload(adapter_names=["default", "second"])
    torch.testing.assert_close(_logits(plain, batch), both, atol=1e-4, rtol=1e-3)


def test_a_merge_that_fails_beside_another_leaves_that_one() -> None:
    model = _two_adapters()
    before = _weights(model)
    model.merge_adapter(["default"], task=1)
    merged = _weights(model)
    with torch.no_grad():
        list(ept.adapters(model, "second").values())[-1].A.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter(["second"], task=1)
    assert _equal(model, merged)
    model.unmerge_adapter()
    assert _equal(model, before)


def test_a_merged_task_is_guarded_where_the_first_layer_is_of_another_adapter() -> None:
    torch.manual_seed(3)
    model = adapted(BERT, BERT.build(), target_modules=["query"])
    model.add_adapter("second", BERT.config(target_modules=["output.dense"]))
    _shake(model, "second")
    model.eval().set_adapter("second")
    batch = BERT.batch()
    wanted = _logits(model, batch, task_ids=1)
    model.merge_adapter(task=1)
    torch.testing.assert_close(_logits(model, batch), wanted, atol=1e-4, rtol=1e-3)
    with pytest.raises(ValueError, match="task_ids must be 1"):
        model(**batch, task_ids=0)


def test_unmerging_nothing_warns() -> None:
    model = adapted(BERT, BERT.build())
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.base_model.unload()


# ---- status and state dicts


@every_method
def test_the_status_names_the_method(kind: Any) -> None:
    config = _config(kind)
    model = peft.get_peft_model(BERT.build(), config)
    assert model.get_model_status().peft_types == {"default": config.peft_type.value}
    assert f"{config.peft_type}" == config.peft_type.value == config.peft_type


def test_a_part_of_a_state_dict_may_be_set() -> None:
    model, other = _two_adapters(), _two_adapters()
    _shake(other, "default")
    state = peft.get_peft_model_state_dict(other)
    part = {key: tensor for key, tensor in state.items() if key.endswith(".A")}
    result = peft.set_peft_model_state_dict(model, part)
    assert part and any("kernels" in key for key in result.missing_keys) and not result.unexpected_keys
    found = peft.get_peft_model_state_dict(model)
    assert all(torch.equal(found[key], state[key]) == (key in part) for key in state)
    for wrong, message in (
        ({key: tensor * float("nan") for key, tensor in part.items()}, "not finite"),
        ({key.replace(".A", ".Z"): tensor for key, tensor in part.items()}, "no place in this model"),
        ({key: tensor[:1] for key, tensor in part.items()}, "in the checkpoint"),
    ):
        with pytest.raises(ValueError, match=message):
            peft.set_peft_model_state_dict(model, wrong)


def test_mismatched_sizes_are_ignored_where_asked(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = BERT.build()
    saved = adapted(BERT, base)
    saved.save_pretrained(tmp_path)
    model = adapted(BERT, base, r=2)
    with pytest.raises(ValueError, match="another pyramid, rank"):
        model.load_adapter(tmp_path, "default")
    before = peft.get_peft_model_state_dict(model)
    before = {key: tensor.clone() for key, tensor in before.items()}
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes"):
        model.load_adapter(tmp_path, "default", ignore_mismatched_sizes=True)
    state = peft.get_peft_model_state_dict(saved)
    for key, tensor in peft.get_peft_model_state_dict(model).items():
        assert torch.equal(tensor, before[key] if key.endswith((".A", ".B")) else state[key]), key


# ---- TuckA's routing module


def _opt() -> nn.Module:
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "ffn_dim": 32, "num_attention_heads": 2}
    return OPTForCausalLM(OPTConfig(vocab_size=VOCABULARY, word_embed_proj_dim=16, dropout=0.0, **shape))


def _gptj() -> nn.Module:
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4, "n_positions": 64}
    dropouts = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0)
    return GPTJForCausalLM(GPTJConfig(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, **shape, **dropouts))


def _bart() -> nn.Module:
    sides = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 32))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "dropout": 0.0}
    return BartForConditionalGeneration(
        BartConfig(vocab_size=VOCABULARY, d_model=16, max_position_embeddings=64, **sides, **heads)
    )


@pytest.mark.parametrize("build", [_opt, _gptj, _bart], ids=["opt", "gptj", "bart"])
def test_tucka_routes_by_the_module_that_is_called_first(build: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = build()
    ids = {"input_ids": torch.randint(3, VOCABULARY, (2, 6))}
    model = peft.get_peft_model(copy.deepcopy(base), ept.TuckAConfig(target_modules=["k_proj", "q_proj", "v_proj"]))
    shared = model.base_model.ept_task_tables["default"]
    called: list[str] = []
    layers = {name: model.base_model.model.get_submodule(name) for name in ept.adapters(model)}
    hooks = [layer.register_forward_pre_hook(lambda *_, n=name: called.append(n)) for name, layer in layers.items()]
    guess = shared.layer
    model.train()(**ids, use_cache=False).logits.mean().backward()
    for hook in hooks:
        hook.remove()
    assert shared.layer == called[0] != guess
    wanted = _logits(model.eval(), ids)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(_logits(loaded, ids), wanted)
    with ept.use_tasks(0), pytest.raises(ValueError, match="was called before"):  # by now it is no guess
        layers[guess](torch.randn(1, 3, 16))


# ---- arguments of other methods


@every_method
def test_rank_and_scale_of_a_layer(kind: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = BERT.build()
    rank = 8 if kind is ept.MOELoRAConfig else 2
    config = _config(kind, rank_pattern={"query": rank}, alpha_pattern={r"layer\.0\..*query": 5})
    model = peft.get_peft_model(copy.deepcopy(base), config)
    for name, adapter in ept.adapters(model).items():
        wanted_rank = rank if name.endswith("query") else config.r
        wanted_scale = 5 if name.endswith("layer.0.attention.self.query") else config.lora_alpha
        if kind is ept.TuckAConfig:
            assert (adapter.U.shape[1], adapter.alpha) == (wanted_rank, wanted_scale)
        else:
            assert adapter.A.shape[-2] == wanted_rank
            assert adapter.scaling == wanted_scale / wanted_rank
    _shake(model)
    batch = BERT.batch()
    model.eval().save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(_logits(loaded, batch, task_ids=1), _logits(model, batch, task_ids=1))


def test_patterns_are_checked() -> None:
    for options, message in (
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\] must be an integer >= 1, got 0"),
        ({"rank_pattern": {"(": 4}}, r"rank_pattern\['\('\] is not a regular expression"),
        ({"rank_pattern": 4}, r"rank_pattern must be \{pattern: r\}, got 4"),
        ({"alpha_pattern": {"q": -1}}, r"alpha_pattern\['q'\] must be a number > 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            ept.EPTConfig(**options)
    with pytest.raises(ValueError, match=r"query.*r must be a multiple of num_experts=8"):
        peft.get_peft_model(BERT.build(), _config(ept.MOELoRAConfig, rank_pattern={"query": 3}))
    with pytest.warns(RuntimeWarning, match="rank_pattern keys did not match"):
        peft.get_peft_model(BERT.build(), _config(rank_pattern={"quarry": 3}))


@pytest.mark.parametrize("bias", ["all", "ept_only"])
@every_method
def test_biases_train_and_are_saved(kind: Any, bias: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = BERT.build()
    model = peft.get_peft_model(copy.deepcopy(base), _config(kind, bias=bias, target_modules=["query", "dense"]))
    adapted_names = set(ept.adapters(model))
    trained = {n for n, p in model.named_parameters() if p.requires_grad and ".ept_" not in n}
    every = {n for n, _ in model.named_parameters() if n.endswith("bias")}
    ours = {n for n in every if n.removesuffix(".base_layer.bias").removeprefix("base_model.model.") in adapted_names}
    assert trained == (every if bias == "all" else ours) and ours
    model.train()(**BERT.batch(), task_ids=0).logits.square().sum().backward()
    parameters = dict(model.named_parameters())
    grads = {n: parameters[n].grad for n in ours}
    assert all(grad is not None for grad in grads.values()) and any(grad.any() for grad in grads.values())
    with torch.no_grad():
        for name in trained:
            parameters[name].add_(0.1 * torch.randn_like(parameters[name]))
    batch = BERT.batch()
    wanted = _logits(model.eval(), batch, task_ids=0)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(_logits(loaded, batch, task_ids=0), wanted)


def test_biases_and_rows_are_finished_with_the_tasks() -> None:
    config = LLAMA.config(bias="all", trainable_token_indices=[3, 4])
    model = adapted(LLAMA, LLAMA.build(), bias="all", trainable_token_indices=[3, 4])
    assert config.bias == "all" and any("trainable_tokens" in n for n, p in model.named_parameters() if p.requires_grad)
    bert = adapted(BERT, BERT.build(), bias="all")
    for adapted_model in (model, bert):
        adapted_model.add_task("delta")
        left = {n for n, p in adapted_model.train().named_parameters() if p.requires_grad}
        assert left == {"base_model.ept_task_tables.default.weight_added"}


@every_method
def test_rows_of_an_embedding_train_are_saved_and_merged(kind: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = LLAMA.build()
    options = {"task_names": None, "num_tasks": 1, "trainable_token_indices": [3, 5], "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(copy.deepcopy(base), _config(kind, exclude_modules=None, **options))
    ids = {"input_ids": torch.tensor([[3, 9, 5, 7], [9, 5, 3, 3]])}
    model.train()(**ids).logits.square().mean().backward()
    (rows,) = (p for n, p in model.named_parameters() if "trainable_tokens_delta" in n)
    assert rows.grad is not None and rows.grad.any()
    with torch.no_grad():
        rows.normal_()
    _shake(model)
    wanted = _logits(model.eval(), ids)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(_logits(loaded, ids), wanted)
    embedding = model.get_input_embeddings().token_adapter.base_layer
    original = embedding.weight.detach().clone()
    if kind in (ept.MixLoRAConfig, ept.TuckAConfig):
        return
    model.merge_adapter()
    assert torch.equal(embedding.weight[[3, 5]], rows)
    torch.testing.assert_close(_logits(model, ids), wanted, atol=1e-4, rtol=1e-3)
    model.unmerge_adapter()
    assert torch.equal(embedding.weight, original)
    torch.testing.assert_close(_logits(model.merge_and_unload(), ids), wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("options", [{"bias": "ept_only"}, {"trainable_token_indices": {"word_embeddings": [3]}}])
def test_exports_without_a_place_for_it_refuse_what_trained_beside_the_layers(options: dict, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = adapted(BERT, BERT.build(), **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".ept_" not in name:
                parameter.normal_()
    (argument,) = options
    for export in (ept.export_lora, lambda *args: ept.export_deltas(args[0], args[2])):
        with pytest.raises(ValueError, match=f"trained with {argument}=.* ept.export_merged"):
            export(model, 1, tmp_path / "small")
    batch = BERT.batch()
    wanted = _logits(model, batch, task_ids=1)
    ept.export_merged(model, 1, tmp_path / "merged")
    plain = BertForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(_logits(plain, batch), wanted, atol=1e-4, rtol=1e-3)


@every_method
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": "lora_only"}, "bias must be one of none, all, ept_only, got 'lora_only'"),
        ({"target_parameters": ["experts.up"]}, r"target_parameters must be None, got \['experts.up'\]: .* a module"),
        ({"layer_replication": [(0, 2)]}, r"layer_replication must be None, got \[\(0, 2\)\]: replicate the layers"),
        ({"trainable_token_indices": ["3"]}, "trainable_token_indices must be None, a list of integers"),
        ({"trainable_token_indices": {"emb": [-1]}}, "trainable_token_indices must be None, a list of integers"),
    ],
)
def test_what_no_method_serves_is_refused_by_name(kind: Any, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**options)
    kind(bias="none", target_parameters=[], layer_replication=None, trainable_token_indices=None)


# ---- other tuners


def test_other_tuners_refuse_by_name(tmp_path: Path) -> None:
    base = LLAMA.build()
    adapted(LLAMA, base).save_pretrained(tmp_path)
    base.config.use_cache = False
    experts = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters={"0": str(tmp_path)})
    with pytest.raises(ValueError, match=r"EPTConfig configures no LoRA.*X-LoRA.*export_lora"):
        peft.get_peft_model(copy.deepcopy(base), experts)
    assert not hasattr(ept.EPTConfig(), "runtime_config")
    with pytest.raises(ValueError, match="'EPT' is not compatible with the `PeftMixedModel`"):
        peft.get_peft_model(copy.deepcopy(base), LLAMA.config(), mixed=True)
    with pytest.raises(ValueError, match="does not support EPT because it uses shared state"):
        peft.inject_adapter_in_model(LLAMA.config(), copy.deepcopy(base))
    model = awaken(peft.get_peft_model(base, LLAMA.config())).eval()
    with pytest.raises(ValueError, match=r"adapter_names is not supported by EPT: .* task_ids"):
        model(**LLAMA.batch(), task_ids=0, adapter_names=["default"] * 3)
