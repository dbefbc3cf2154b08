"""``ept.load`` and ``ept-predict``: from a text to an answer, by a trained adapter."""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import logging

from .config import is_int
from .export.load import load_with_tasks
from .files import write_atomically
from .introspection import task_names

Text = str | Sequence[str] | Mapping[str, Any]
Task = str | int | None


def load(adapter: str | Path, base: str | None = None, *, device: str | torch.device | None = None) -> Predictor:
    """A trained adapter with its base model, ready to answer.

    Args:
        adapter: what ``ept-train --output`` named, or a folder of PEFT's ``save_pretrained``.
        base: name or folder of the base model; None: the one that the adapter names.
        device: default: the GPU if there is one, else the CPU.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: the adapter is damaged or not stored as safetensors, names no base, or has no tokenizer.
    """
    model, tokenizer, specs = load_with_tasks(adapter, base)
    if tokenizer is None:
        raise ValueError(f"adapter {str(adapter)!r} has no tokenizer, and neither has its base; save one beside it")
    chosen = device if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    return Predictor(model.to(chosen), tokenizer, specs)


class Predictor:
    """A model with a trained adapter, its tokenizer and its tasks.

    Attributes:
        model: in evaluation mode.
        tokenizer: the one it was trained with.
        tasks: names of the tasks, in the order of their ids; empty where the adapter names none.
    """

    def __init__(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, specs: Sequence[Any] | None = None):
        self.model = model.eval()
        self.tokenizer = tokenizer
        self._specs = None if specs is None else list(specs)
        config = model.peft_config[model.active_adapter]
        # A config of this package has tasks; PEFT's own LoRA has none, and its model takes no ids.
        self._routes = hasattr(config, "task_names")
        self.tasks = [spec.name for spec in specs] if specs else task_names(model) if self._routes else []
        self._generates = hasattr(model.get_base_model(), "prepare_inputs_for_generation")

    def predict(
        self,
        texts: Text | Sequence[Text],
        task: Task | Sequence[str | int] = None,
        *,
        batch_size: int = 32,
        max_length: int = 128,
        max_new_tokens: int = 16,
    ) -> list[dict[str, Any]]:
        """The answer to every text.

        Args:
            texts: a text, a pair of texts, a row as in a data file (``text``, ``text_pair``, ``choices``), or a list of
                these. A pair is a tuple.
            task: name or id, for all texts or one for each; may be left out where there is one task.
            batch_size: texts of a forward pass. A batch may mix tasks.
            max_length: tokens of a text at most; longer ones are cut as in training.
            max_new_tokens: of an answer, for language models.

        Returns:
            For each text ``{"task", "label", "score", "scores"}`` (the score is the label's probability), of a
            regression task ``{"task", "value"}``, of a language model ``{"task", "label" or "value", "text"}``, None
            where the text that it wrote names no label.

        Raises:
            ValueError: an unknown task, no task where there are several, another number of tasks than of texts, an
                empty text, or a row of another shape.
            TypeError: a language model without tasks: use ``generate``.
        """
        rows = _rows(texts)
        ids = self._task_ids(task, len(rows))
        if self._generates and self._specs is None:
            raise TypeError("this language model has no labelled tasks: generate(prompts) gives its texts")
        _check_positive(batch_size=batch_size, max_length=max_length, max_new_tokens=max_new_tokens)
        # Neighbours of similar length need little padding.
        order = sorted(
            range(len(rows)), key=lambda place: len(rows[place]["text"]) + len(rows[place]["text_pair"] or "")
        )
        answers: list[dict[str, Any]] = [{}] * len(rows)
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            chosen = [rows[place] for place in places], [ids[place] for place in places]
            if self._generates:
                found = self._written(*chosen, max_length, max_new_tokens)
            else:
                found = self._classified(*chosen, max_length)
            for place, answer in zip(places, found, strict=True):
                answers[place] = answer
        return answers

    def generate(
        self,
        prompts: str | Sequence[str | Sequence[Mapping[str, str]]],
        task: Task | Sequence[str | int] = None,
        *,
        batch_size: int = 8,
        max_new_tokens: int = 128,
        **options: Any,
    ) -> list[str]:
        """What the language model writes after every prompt, without the prompt.

        Args:
            prompts: a text, or a list of texts or conversations (lists of ``{"role", "content"}``, put into the
                tokenizer's chat template).
            task: as for ``predict``.
            options: for transformers' ``generate``.

        Raises:
            TypeError: the model does not generate.
            ValueError: as ``predict``.
        """
        if not self._generates:
            raise TypeError(f"the model is a {type(self.model.get_base_model()).__name__}, which does not generate")
        listed = [prompts] if isinstance(prompts, str) else list(prompts)
        ids = self._task_ids(task, len(listed))
        _check_positive(batch_size=batch_size, max_new_tokens=max_new_tokens)
        texts = [self._prompt(prompt) for prompt in listed]
        written: list[str] = []
        for start in range(0, len(texts), batch_size):
            part = slice(start, start + batch_size)
            # A chat template has written the special tokens already.
            plain = isinstance(listed[start], str)
            inputs = self._padded(texts[part], special=plain)
            written += self._generate(inputs, ids[part], max_new_tokens, **options)
        return written

    def for_task(self, task: Task = None) -> OneTask:
        """The model as one that knows a single task, for ``transformers.pipeline`` and others that pass no ids.

        pipe = pipeline("text-classification", model=loaded.for_task("movies"), tokenizer=loaded.tokenizer)
        """
        (task_id,) = self._task_ids(task, 1)
        spec = None if self._specs is None else self._specs[task_id or 0]
        return OneTask(self.model, task_id, None if spec is None or self._generates else spec)

    @property
    def _config(self) -> Any:
        return self.model.get_base_model().config

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    # ---- what is asked

    def _task_ids(self, task: Task | Sequence[str | int], count: int) -> list[int | None]:
        given = [task] * count if task is None or isinstance(task, (str, int)) else list(task)
        if len(given) != count:
            raise ValueError(f"task must be one for all texts or one for each of the {count}, got {len(given)}")
        return [self._task_id(one) for one in given]

    def _task_id(self, task: Task) -> int | None:
        allowed = ", ".join(self.tasks)
        if task is None:
            if len(self.tasks) > 1:
                raise ValueError(f"task is missing: the adapter has {len(self.tasks)} of them; name one of: {allowed}")
            return 0 if self.tasks else None
        if isinstance(task, int) and is_int(task) and 0 <= task < len(self.tasks):
            return task
        if task in self.tasks:
            return self.tasks.index(str(task))
        raise ValueError(f"task: unknown {task!r}; the adapter has: {allowed or 'no tasks'}")

    def _prompt(self, prompt: str | Sequence[Mapping[str, str]]) -> str:
        if isinstance(prompt, str):
            if not prompt.strip():
                raise ValueError("prompts: a prompt is empty")
            return prompt
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise ValueError("prompts: a conversation needs a tokenizer with a chat template; give texts")
        messages: Any = list(prompt)
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    # ---- how it is answered

    def _inputs(self, encoded: Mapping[str, Tensor], ids: Sequence[int | None]) -> dict[str, Any]:
        inputs = {name: value.to(self._device) for name, value in encoded.items()}
        takes_ids = self._routes or (self._specs is not None and not self._generates)
        return {**inputs, "task_ids": torch.tensor(ids, device=self._device)} if takes_ids else inputs

    @torch.no_grad()
    def _classified(
        self, rows: Sequence[dict[str, Any]], ids: Sequence[int | None], max_length: int
    ) -> list[dict[str, Any]]:
        encoded = self._encode(rows, ids, max_length)
        logits = self.model(**self._inputs(encoded, ids)).logits.float()
        values = self._values(logits, ids)
        answers = []
        for own, value, task_id in zip(logits, values, ids, strict=True):
            names = self._labels(task_id)
            named = {"task": self.tasks[task_id]} if task_id is not None and self.tasks else {}
            if names is None:
                answers.append({**named, "value": value})
                continue
            shares = own[: len(names)].softmax(0).tolist()
            best = max(range(len(names)), key=shares.__getitem__)
            scores = dict(zip(names, shares, strict=True))
            answers.append({**named, "label": names[best], "score": shares[best], "scores": scores})
        return answers

    def _encode(self, rows: Sequence[dict[str, Any]], ids: Sequence[int | None], max_length: int) -> dict[str, Tensor]:
        if self._specs is not None:
            from .training.collator import EncoderCollator

            batch = EncoderCollator(self.tokenizer, max_length)([{**row, "label": 0, "task_id": 0} for row in rows])
            return {name: value for name, value in batch.items() if name not in ("labels", "task_ids")}
        paired = rows[0]["text_pair"] is not None
        if any((row["text_pair"] is not None) is not paired for row in rows):
            raise ValueError("texts: pairs and single texts in one batch; give them apart")
        columns = [[row[name] for row in rows] for name in ("text", "text_pair")[: 1 + paired]]
        return dict(self.tokenizer(*columns, truncation=True, max_length=max_length, padding=True, return_tensors="pt"))

    def _values(self, logits: Tensor, ids: Sequence[int | None]) -> list[float]:
        """Class indices, or numbers in the unit of a regression task's labels."""
        base: Any = self.model.get_base_model()
        if self._specs is not None:
            return base.predict(logits, torch.tensor(ids, device=logits.device)).tolist()
        return logits[:, 0].tolist()

    def _labels(self, task_id: int | None) -> tuple[str, ...] | None:
        """Names by class index; None of regression."""
        if self._specs is not None:
            return self._specs[task_id or 0].label_names
        config = self._config
        return None if config.num_labels == 1 else tuple(config.id2label[i] for i in range(config.num_labels))

    def _written(
        self, rows: Sequence[dict[str, Any]], ids: Sequence[int | None], max_length: int, max_new_tokens: int
    ) -> list[dict[str, Any]]:
        from .data import parse_target, prompt

        assert self._specs is not None
        specs = [self._specs[task_id or 0] for task_id in ids]
        for spec, row in zip(specs, rows, strict=True):
            if spec.kind == "multiple_choice" and not row["choices"]:
                raise ValueError(f"texts: the task {spec.name!r} is multiple choice; give rows with text and choices")
        prompts = [prompt(spec, row) for spec, row in zip(specs, rows, strict=True)]
        inputs = self._padded(prompts, max_length=max(8, max_length - max_new_tokens))
        answers = []
        for spec, text in zip(specs, self._generate(inputs, ids, max_new_tokens, do_sample=False), strict=True):
            value = parse_target(spec, text)
            if spec.label_names is None:
                answers.append({"task": spec.name, "value": value, "text": text})
            else:
                label = None if value is None else spec.label_names[int(value)]
                answers.append({"task": spec.name, "label": label, "text": text})
        return answers

    @cached_property
    def _prompt_tokenizer(self) -> PreTrainedTokenizerBase:
        """A copy, since the caller's keeps its sides and its padding; made once, which takes as long as a batch."""
        tokenizer = copy.deepcopy(self.tokenizer)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if not self._config.is_encoder_decoder:
            tokenizer.padding_side = tokenizer.truncation_side = "left"
        return tokenizer

    def _padded(
        self, texts: Sequence[str], *, max_length: int | None = None, special: bool = True
    ) -> dict[str, Tensor]:
        """Prompts of one batch: a causal model's are padded on the left and lose their beginning, if they are long."""
        tokenizer, causal = self._prompt_tokenizer, not self._config.is_encoder_decoder
        limit: dict[str, Any] = {} if max_length is None else {"truncation": True, "max_length": max_length}
        encoded = tokenizer(list(texts), add_special_tokens=special, **limit)["input_ids"]
        if causal:  # an end token would end the answer before it begins
            encoded = [ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id and special else ids for ids in encoded]
        return dict(tokenizer.pad({"input_ids": encoded}, return_tensors="pt"))

    def _generate(
        self, inputs: Mapping[str, Tensor], ids: Sequence[int | None], max_new_tokens: int, **options: Any
    ) -> list[str]:
        pad = self.tokenizer.pad_token_id
        options.setdefault("pad_token_id", self.tokenizer.eos_token_id if pad is None else pad)
        with torch.no_grad():
            found: Any = self.model.generate(**self._inputs(inputs, ids), max_new_tokens=max_new_tokens, **options)
        causal = not self._config.is_encoder_decoder
        written = found[:, inputs["input_ids"].shape[1] :] if causal else found
        return [text.strip() for text in self.tokenizer.batch_decode(written, skip_special_tokens=True)]


class OneTask(nn.Module):
    """A model under one task: callers pass no ids, and logits are those of the task's own labels.

    Made by ``Predictor.for_task``. It has what ``transformers.pipeline`` asks of a model.
    """

    def __init__(self, model: PeftModel, task_id: int | None, spec: Any = None) -> None:
        super().__init__()
        self.model = model
        self._ids = {} if task_id is None else {"task_ids": task_id}
        self._spec = spec
        config: Any = copy.deepcopy(model.get_base_model().config)
        if spec is not None:
            names = spec.label_names or (spec.name,)
            config.id2label = dict(enumerate(names))
            config.label2id = {name: place for place, name in enumerate(names)}
            config.problem_type = None if spec.label_names else "regression"
        self.config = config

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The model's floating dtype."""
        return next(self.model.parameters()).dtype

    @property
    def generation_config(self) -> Any:
        """The base model's."""
        return self.model.get_base_model().generation_config

    def can_generate(self) -> bool:
        """Whether the base model writes text."""
        return hasattr(self.model.get_base_model(), "prepare_inputs_for_generation")

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """As the model's, under the task."""
        output = self.model(*inputs, **options, **self._ids)
        if self._spec is None:
            return output
        logits = output.logits[:, : self._spec.num_labels]
        if self._spec.label_names is None:  # in the unit of the labels
            base: Any = self.model.get_base_model()
            logits = base.predict(logits, self._ids["task_ids"])[:, None]
        return SequenceClassifierOutput(loss=output.loss, logits=logits)

    def generate(self, *inputs: Any, **options: Any) -> Any:
        """As the model's, under the task."""
        return self.model.generate(*inputs, **options, **self._ids)


def _rows(texts: Text | Sequence[Text]) -> list[dict[str, Any]]:
    one = isinstance(texts, (str, tuple, Mapping))
    return [_row(text, place) for place, text in enumerate([texts] if one else texts)]


def _row(text: Any, place: int) -> dict[str, Any]:
    row: dict[str, Any]
    if isinstance(text, str):
        row = {"text": text}
    elif isinstance(text, Mapping):
        row = dict(text)
    elif isinstance(text, Sequence) and len(text) == 2:
        row = {"text": text[0], "text_pair": text[1]}
    else:
        raise ValueError(f"texts[{place}] must be a text, a pair of texts or a row with 'text', got {text!r}")
    row = {"text": row.get("text"), "text_pair": row.get("text_pair"), "choices": row.get("choices")}
    for name in ("text", "text_pair"):
        if (name == "text" or row[name] is not None) and (not isinstance(row[name], str) or not row[name].strip()):
            raise ValueError(f"texts[{place}]: {name} must be a text that is not blank, got {row[name]!r}")
    return row


def _check_positive(**numbers: int) -> None:
    for name, value in numbers.items():
        if not is_int(value) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


# --- the command ------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``ept-predict``."""
    parser = argparse.ArgumentParser(
        prog="ept-predict",
        description="Answer texts with a trained adapter; one JSON object a text, in the order of the texts.",
    )
    parser.add_argument("adapter", help="folder of ept-train, or of PEFT's save_pretrained")
    parser.add_argument("texts", nargs="*", help="texts to answer (default: --file)")
    parser.add_argument("--task", help="name or id; needed where there are several, unless the rows name theirs")
    parser.add_argument(
        "--file",
        default="-",
        help="a text a line, or JSON rows (*.jsonl: text, text_pair, choices, task); - is the standard input (default)",
    )
    parser.add_argument("--output", type=Path, help="file to write (default: the standard output)")
    parser.add_argument("--base", help="base model: name or folder (default: the adapter's)")
    parser.add_argument("--generate", action="store_true", help="write on from the text, instead of naming a label")
    parser.add_argument("--batch-size", type=int, default=32, help="texts of a forward pass (default: 32)")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a text at most (default: 128)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="tokens of an answer at most (default: 64)")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``ept-predict`` with these arguments (None: the process's); 0 on success.

    Raises:
        SystemExit: code 2, after a message; no answer has been written to ``--output`` then.
    """
    parser = build_parser()
    options = parser.parse_intermixed_args(argv)
    if not options.texts and options.file != "-" and not Path(options.file).is_file():
        parser.error(f"argument --file: {options.file!r} is not a file")
    logging.disable_progress_bar()
    try:
        loaded = load(options.adapter, options.base, device=options.device)
        rows = _given(options)
        task = (
            int(options.task)
            if options.task and options.task.isdecimal() and options.task not in loaded.tasks
            else options.task
        )
        started, count = time.perf_counter(), 0
        if options.output is None:
            for line in _answer(loaded, rows, task, options):
                print(line, flush=True)
                count += 1
        else:
            lines = list(_answer(loaded, rows, task, options))
            count = len(lines)
            write_atomically(options.output, lambda path: path.write_text("".join(f"{line}\n" for line in lines)))
        seconds = time.perf_counter() - started
    except (OSError, TypeError, ValueError, RuntimeError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print(f"{count} texts in {seconds:.1f} s, {count / max(seconds, 1e-9):.1f} a second", file=sys.stderr)
    return 0


def _given(options: argparse.Namespace) -> Iterator[Any]:
    """The texts or rows asked about, read as they come."""
    if options.texts:
        yield from options.texts
        return
    if options.file == "-":
        yield from _lines(sys.stdin, json_rows=False)
        return
    with Path(options.file).open(encoding="utf-8") as file:
        yield from _lines(file, json_rows=options.file.endswith(".jsonl"))


def _lines(lines: Iterable[str], *, json_rows: bool) -> Iterator[Any]:
    for number, line in enumerate(lines, 1):
        text = line.rstrip("\r\n")
        if not json_rows:
            yield text
            continue
        try:
            row = json.loads(text)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"--file: line {number} is not a JSON object: {text[:80]!r}")
        yield row


def _answer(loaded: Predictor, rows: Iterator[Any], task: Task, options: argparse.Namespace) -> Iterator[str]:
    while chunk := list(islice(rows, 8 * options.batch_size if options.batch_size > 0 else 1)):
        tasks: Any = [row.get("task", task) if isinstance(row, dict) else task for row in chunk]
        if options.generate:
            prompts: Any = [
                row.get("messages", row.get("prompt", row.get("text"))) if isinstance(row, dict) else row
                for row in chunk
            ]
            texts = loaded.generate(
                prompts, tasks, batch_size=options.batch_size, max_new_tokens=options.max_new_tokens
            )
            answers: list[dict[str, Any]] = [{"text": text} for text in texts]
        else:
            sizes = {"batch_size": options.batch_size, "max_length": options.max_length}
            answers = loaded.predict(chunk, tasks, max_new_tokens=options.max_new_tokens, **sizes)
        for answer in answers:
            yield json.dumps(answer, ensure_ascii=False)


if __name__ == "__main__":
    sys.exit(main())
