"""From a text to an answer: ``ept.load`` and ``ept-predict``."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

import ept
from ept.data import TaskData
from ept.predict import main
from ept.training.evaluate import predict_batch
from ept.training.multitask import MultiTaskEncoder
from ept.training.saving import save_trained

TEXTS = ["the poor weak", "a very quite fine great", "great", "poor the the the the a"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tasks: list[TaskData], toys: SimpleNamespace) -> dict[str, Path]:
    """An adapter of every kind of model, as ``ept-train`` leaves it, with kernels that are not zero."""
    made = {}
    specs = [task.spec for task in tasks]
    for kind in ("encoder", "seq2seq", "causal"):
        folder = tmp_path_factory.mktemp(kind)
        base, tokenizer = toys.make_base(kind), toys.make_tokenizer(kind)
        base.save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
        names = ["query", "value"] if kind == "encoder" else ["q", "v"] if kind == "seq2seq" else ["q_proj", "v_proj"]
        config = ept.EPTConfig(
            r=2,
            task_names=[spec.name for spec in specs],
            target_modules=names,
            modules_to_save=["heads"] if kind == "encoder" else None,
            task_type={"encoder": None, "seq2seq": "SEQ_2_SEQ_LM", "causal": "CAUSAL_LM"}[kind],
        )
        torch.manual_seed(1)
        model = get_peft_model(MultiTaskEncoder(base, specs) if kind == "encoder" else base, config)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "kernel" in name:
                torch.nn.init.normal_(parameter, std=0.5)
        save_trained(folder, model, tokenizer, specs, base_model=str(folder / "base"))
        made[kind] = folder
    return made


def test_a_classifier_answers_with_names_and_shares(folders: dict[str, Path]) -> None:
    loaded = ept.load(folders["encoder"])
    assert loaded.tasks == ["polarity", "topic", "degree"]
    answers = loaded.predict(TEXTS, "polarity", batch_size=3)
    inputs = loaded.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = loaded.model(**inputs, task_ids=0).logits[:, :2]
    for answer, own in zip(answers, logits.softmax(1), strict=True):
        assert answer["task"] == "polarity"
        assert answer["scores"] == pytest.approx({"bad": own[0].item(), "good": own[1].item()}, abs=1e-5)
        assert answer["label"] == ("bad", "good")[int(own.argmax())]
        assert answer["score"] == max(answer["scores"].values())


def test_texts_of_several_tasks_share_a_batch(folders: dict[str, Path]) -> None:
    loaded = ept.load(folders["encoder"] / "adapter")
    wanted = ["degree", 1, "polarity"]
    texts = ["great great poor", ("the boat", "wind a hill"), "weak"]
    together = loaded.predict(texts, wanted)
    alone = [loaded.predict(text, task)[0] for text, task in zip(texts, wanted, strict=True)]
    for mixed, single in zip(together, alone, strict=True):
        assert mixed.keys() == single.keys()
        assert mixed.get("label") == single.get("label")
        assert mixed.get("value") == (pytest.approx(single["value"], abs=1e-4) if "value" in single else None)
    assert set(together[0]) == {"task", "value"}
    assert set(together[1]["scores"]) == {"sea", "sky", "land"}


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_a_language_model_answers_as_it_is_scored(kind: str, folders: dict[str, Path], tasks: list[TaskData]) -> None:
    loaded = ept.load(folders[kind])
    spec = tasks[0].spec
    answers = loaded.predict([{"text": text} for text in TEXTS], "polarity", max_new_tokens=4)
    prompts = [f"polarity sentence: {text} answer:" for text in TEXTS]
    written = [loaded.generate(prompt, "polarity", max_new_tokens=4, do_sample=False)[0] for prompt in prompts]
    assert [answer["text"] for answer in answers] == written
    assert all(answer["label"] in (None, *spec.label_names) for answer in answers)
    for text, answer in zip(TEXTS, answers, strict=True):
        ids = loaded.tokenizer(f"polarity sentence: {text} answer:", return_tensors="pt")["input_ids"]
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros(1)}
        batch["task_ids"] = torch.tensor([0])
        (value,), _ = predict_batch(loaded.model, batch, spec, loaded.tokenizer, max_new_tokens=4)
        assert answer["label"] == (None if value.isnan() else spec.label_names[int(value)])


def test_a_conversation_is_put_into_the_chat_template(folders: dict[str, Path]) -> None:
    loaded = ept.load(folders["causal"])
    with pytest.raises(ValueError, match="needs a tokenizer with a chat template"):
        loaded.generate([[{"role": "user", "content": "the boat"}]], "topic")
    loaded.tokenizer.chat_template = "{% for m in messages %}question: {{ m.content }} {% endfor %}answer:"
    (chat,) = loaded.generate([[{"role": "user", "content": "the boat"}]], "topic", max_new_tokens=4, do_sample=False)
    (text,) = loaded.generate(["question: the boat answer:"], "topic", max_new_tokens=4, do_sample=False)
    assert chat == text


def test_transformers_pipelines_take_one_task(folders: dict[str, Path]) -> None:
    loaded = ept.load(folders["encoder"])
    pipe = transformers.pipeline("text-classification", model=loaded.for_task("topic"), tokenizer=loaded.tokenizer)
    (expected,) = loaded.predict("a boat wave", "topic")
    (found,) = pipe("a boat wave", top_k=1)
    assert found["label"] == expected["label"]
    assert found["score"] == pytest.approx(expected["score"], abs=1e-5)
    (number,) = transformers.pipeline(
        "text-classification", model=loaded.for_task("degree"), tokenizer=loaded.tokenizer, function_to_apply="none"
    )("great poor")
    assert number["score"] == pytest.approx(loaded.predict("great poor", "degree")[0]["value"], abs=1e-4)

    writer = ept.load(folders["causal"])
    pipe = transformers.pipeline("text-generation", model=writer.for_task("topic"), tokenizer=writer.tokenizer)
    (found,) = pipe("question: the boat answer:", max_new_tokens=4, do_sample=False, return_full_text=False)
    (expected,) = writer.generate("question: the boat answer:", "topic", max_new_tokens=4, do_sample=False)
    assert found["generated_text"].strip() == expected


@pytest.mark.parametrize("method", ["lora", "ept"])
def test_an_adapter_of_plain_peft_answers(method: str, tmp_path: Path, toys: SimpleNamespace) -> None:
    base = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=len(toys.vocabulary),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            id2label={0: "no", 1: "yes"},
            label2id={"no": 0, "yes": 1},
        )
    )
    base.save_pretrained(tmp_path / "base")
    base.config._name_or_path = base.name_or_path = str(tmp_path / "base")
    toys.make_tokenizer("encoder").save_pretrained(tmp_path / "adapter")
    options = {"target_modules": ["query"], "task_type": "SEQ_CLS"}
    config = LoraConfig(**options) if method == "lora" else ept.EPTConfig(task_names=["a", "b"], **options)
    model = get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = ept.load(tmp_path / "adapter")
    task = None if method == "lora" else "b"
    answers = loaded.predict(TEXTS, task)
    with torch.no_grad():
        ids = {} if method == "lora" else {"task_ids": 1}
        logits = model(**loaded.tokenizer(TEXTS, padding=True, return_tensors="pt"), **ids).logits
    assert [answer["label"] for answer in answers] == [("no", "yes")[i] for i in logits.argmax(1)]


def test_bad_questions_are_named(folders: dict[str, Path]) -> None:
    loaded = ept.load(folders["encoder"])
    for texts, task, message in [
        (["a"], None, "task is missing: the adapter has 3 of them; name one of: polarity, topic, degree"),
        (["a"], "magic", "task: unknown 'magic'; the adapter has: polarity, topic, degree"),
        (["a"], 3, "task: unknown 3"),
        (["a", "b"], ["topic"], "one for each of the 2, got 1"),
        (["a", " "], "topic", r"texts\[1\]: text must be a text that is not blank, got ' '"),
        ([{"question": "a"}], "topic", r"texts\[0\]: text must be"),
        ([("a", "b", "c")], "topic", r"texts\[0\] must be a text, a pair of texts"),
    ]:
        with pytest.raises(ValueError, match=message):
            loaded.predict(texts, task)
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, got 0"):
        loaded.predict(["a"], "topic", batch_size=0)
    with pytest.raises(TypeError, match="MultiTaskEncoder, which does not generate"):
        loaded.generate(["a"], "topic")


def test_the_command_answers_arguments_files_and_the_standard_input(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = str(folders["encoder"])
    expected = ept.load(adapter).predict(TEXTS, "polarity")

    def same(text: str) -> None:
        found = [json.loads(line) for line in text.splitlines()]
        assert [answer["label"] for answer in found] == [answer["label"] for answer in expected]

    assert main([adapter, *TEXTS, "--task", "polarity", "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    same(printed.out)
    assert printed.err.splitlines()[-1].startswith("4 texts in ")
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(TEXTS)))
    assert main([adapter, "--task", "0"]) == 0
    same(capsys.readouterr().out)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text, "task": "polarity"}) + "\n" for text in TEXTS))
    assert main([adapter, "--file", str(rows), "--output", str(tmp_path / "out.jsonl"), "--batch-size", "3"]) == 0
    same((tmp_path / "out.jsonl").read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "magic", "a"], "task: unknown 'magic'; the adapter has: polarity, topic, degree"),
        (["--file", "nowhere.txt", "--task", "topic"], "argument --file: 'nowhere.txt' is not a file"),
        (["--batch-size", "0", "--task", "topic", "a"], "batch_size must be an integer of at least 1, got 0"),
    ],
)
def test_a_bad_command_is_named(
    arguments: list[str], message: str, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    with pytest.raises(SystemExit) as stopped:
        main([str(folders["encoder"]), *arguments, "--output", str(output)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1] == f"ept-predict: error: {message}"
    assert not output.exists()
