"""Tiny models, a word-level tokenizer and three small tasks, all made here."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from ept.data import TaskData, TaskSpec
from ept.training import EPTTrainingArguments, MultiTaskEncoder

for folder in ("benchmarks", "benchmarks/quality"):  # scripts, importable as they are to each other
    sys.path.insert(0, str(Path(__file__).parents[2] / folder))

POLARITY = TaskSpec("polarity", "classification", ("sentence",), ("bad", "good"), ("accuracy", "f1"))
TOPIC = TaskSpec("topic", "classification", ("left", "right"), ("sea", "sky", "land"), ("accuracy",))
DEGREE = TaskSpec("degree", "regression", ("sentence",), None, ("pearson", "spearman"), (0.0, 4.0))
CHOICE = TaskSpec("choice", "multiple_choice", ("question", "choices"), ("A", "B", "C"), ("accuracy",))

_WORDS = ["poor", "weak", "fine", "great", "wave", "boat", "cloud", "wind", "hill", "road", "the", "a", "very", "quite"]
_EXTRA = ["answer", ":", "sentence", "left", "right", "question", "choices", ")", ".", "polarity", "topic", "degree"]
_EXTRA += ["choice", "A", "B", "C", "bad", "good", "sea", "sky", "land", *"0123456789"]
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[EOS]"]
VOCABULARY = {word: index for index, word in enumerate([*_SPECIAL, *_WORDS, *_EXTRA])}


def _sentence(random_: random.Random, words: list[str]) -> str:
    return " ".join(random_.choices(["the", "a", "very", "quite"], k=random_.randint(1, 5)) + words)


def _rows(spec: TaskSpec, count: int, seed: int) -> Dataset:
    random_ = random.Random(seed)
    rows = {"text": [], "text_pair": [], "label": []}
    if spec.kind == "multiple_choice":
        rows["choices"] = []
    for _ in range(count):
        pair = None
        if spec is DEGREE:
            label = float(random_.randint(0, 4))
            words = ["great"] * int(label) + ["poor"] * (4 - int(label))
        else:
            label = random_.randrange(spec.num_labels)
            words = [_WORDS[2 * label], _WORDS[2 * label + 1]]
        if spec.text_columns[1:] == ("right",):
            pair = _sentence(random_, [random_.choice(_WORDS)])
        if spec.kind == "multiple_choice":
            rows["choices"].append(["poor", "fine", "wave"])
        rows["text"].append(_sentence(random_, words))
        rows["text_pair"].append(pair)
        rows["label"].append(label)
    return Dataset.from_dict(rows)


def make_task(spec: TaskSpec, train: int = 60, validation: int = 20) -> TaskData:
    """A task whose label can be read off its words."""
    return TaskData(spec, _rows(spec, train, seed=1), _rows(spec, validation, seed=2))


@pytest.fixture(scope="session")
def tasks() -> list[TaskData]:
    return [make_task(POLARITY, 60), make_task(TOPIC, 200), make_task(DEGREE, 33)]


@pytest.fixture(scope="session")
def choice_task() -> TaskData:
    return make_task(CHOICE, 40)


def make_tokenizer(kind: str) -> transformers.PreTrainedTokenizerFast:
    """Words to ids; encoders get [CLS] and [SEP], seq2seq models a final [EOS], causal ones nothing."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(True)])
    specials = [(name, VOCABULARY[name]) for name in ("[CLS]", "[SEP]", "[EOS]")]
    if kind == "encoder":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=specials
        )
    if kind == "seq2seq":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A [EOS]", pair="$A $B [EOS]", special_tokens=specials
        )
    names = ["input_ids", "token_type_ids", "attention_mask"] if kind == "encoder" else ["input_ids", "attention_mask"]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        eos_token=None if kind == "encoder" else "[EOS]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=names,
    )


def make_base(kind: str, seed: int = 0) -> torch.nn.Module:
    """A randomly initialised BERT (without head), T5 or LLaMA of a few thousand parameters."""
    torch.manual_seed(seed)
    size = len(VOCABULARY)
    if kind == "encoder":
        config = transformers.BertConfig(
            vocab_size=size, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        )
        return transformers.BertModel(config, add_pooling_layer=False)
    if kind == "seq2seq":
        config = transformers.T5Config(
            vocab_size=size,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            pad_token_id=0,
            eos_token_id=VOCABULARY["[EOS]"],
            decoder_start_token_id=0,
        )
        return transformers.T5ForConditionalGeneration(config)
    config = transformers.LlamaConfig(
        vocab_size=size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=VOCABULARY["[EOS]"],
    )
    return transformers.LlamaForCausalLM(config)


def quiet_arguments(folder: Path, **options: Any) -> EPTTrainingArguments:
    """Of six steps of eight rows at a rate at which toys learn; on the CPU, without bars or checkpoints."""
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 6,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "save_strategy": "no",
        "max_new_tokens": 3,
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return EPTTrainingArguments(**defaults | options)


def make_model(kind: str, specs: list[TaskSpec], seed: int = 0) -> torch.nn.Module:
    """The base model, for encoders with its heads."""
    base = make_base(kind, seed)
    return MultiTaskEncoder(base, specs) if kind == "encoder" else base


@pytest.fixture(scope="session")
def toys() -> SimpleNamespace:
    """The makers above and their vocabulary, for tests that need more than the ready tasks."""
    return SimpleNamespace(
        vocabulary=VOCABULARY,
        specs=(POLARITY, TOPIC, DEGREE, CHOICE),
        make_task=make_task,
        make_tokenizer=make_tokenizer,
        make_base=make_base,
        make_model=make_model,
        quiet_arguments=quiet_arguments,
    )


def write_source(root: Path, tasks: list[TaskData]) -> None:
    """``model`` (tiny BERT), ``t5``, ``llama`` and ``data`` (these tasks)."""
    for name, kind in (("model", "encoder"), ("t5", "seq2seq"), ("llama", "causal")):
        make_base(kind).save_pretrained(root / name)
        make_tokenizer(kind).save_pretrained(root / name)
    index = {"format": 1, "tasks": {}}
    for task in tasks:
        spec, splits = task.spec, {}
        (root / "data" / spec.name).mkdir(parents=True)
        columns = dict(zip(("text", "text_pair"), spec.text_columns, strict=False))
        for split in ("train", "validation"):
            table = getattr(task, split)
            table = table.remove_columns([c for c in ("text", "text_pair") if c not in columns]).rename_columns(columns)
            table.to_parquet(str(root / "data" / spec.name / f"{split}.parquet"))
            splits[split] = {"file": f"{spec.name}/{split}.parquet"}
        entry = {"kind": spec.kind, "text_columns": spec.text_columns, "metric": "+".join(spec.metrics)}
        index["tasks"][spec.name] = {**entry, "label_names": spec.label_names, "splits": splits}
        if spec.label_range is not None:
            index["tasks"][spec.name]["label_range"] = spec.label_range
    (root / "data" / "index.json").write_text(json.dumps(index))


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory, tasks: list[TaskData]) -> Path:
    """A folder with what ``write_source`` writes of the three toy tasks."""
    root = tmp_path_factory.mktemp("source")
    write_source(root, tasks)
    return root


@pytest.fixture(scope="session")
def command(source: Path) -> Callable[..., list[str]]:
    """Makes the arguments of a quick run; keyword arguments add or (None) remove options."""

    def make(output: Path | None, *flags: str, **options: object) -> list[str]:
        defaults = {"model": source / "model", "data": source / "data", "lr": 0.01, "r": 2, "kernel_sizes": "1,2,2"}
        defaults |= {"max_steps": 6, "batch_size": 8, "max_length": 32, "save_steps": 3, "dropout": 0.1}
        named = {"output": output, **defaults, **options}
        parts = [(f"--{n.replace('_', '-')}", str(v)) for n, v in named.items() if v is not None]
        return [*(part for pair in parts for part in pair), "--quiet", *flags]

    return make
