"""A short run of ``ept-train`` on a tiny model and generated rows; prints digests of what it saved. Its own process.

``python -m training_run FOLDER [OPTION ...]``
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, BertTokenizer

from ept.train import main

_WORDS = ["good", "bad", "sea", "sky", "the", "a", "very", "of"]


def make_data(folder: Path) -> Path:
    """Two small tasks."""
    rng = np.random.default_rng(0)
    tasks = {}
    for name in ("polarity", "place"):
        splits = {}
        (folder / name).mkdir(parents=True)
        for split, rows in (("train", 64), ("validation", 16)):
            texts = [" ".join(rng.choice(_WORDS, 6)) for _ in range(rows)]
            labels = [int(rng.integers(2)) for _ in range(rows)]
            pq.write_table(pa.table({"sentence": texts, "label": labels}), folder / name / f"{split}.parquet")
            splits[split] = {"file": f"{name}/{split}.parquet"}
        described = {"kind": "classification", "text_columns": ["sentence"], "metric": "accuracy"}
        tasks[name] = described | {"label_names": ["no", "yes"], "splits": splits}
    (folder / "index.json").write_text(json.dumps({"format": 1, "tasks": tasks}))
    return folder


def make_model(folder: Path) -> Path:
    """A BERT of two narrow layers, with dropout, and its tokenizer."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_WORDS]
    (folder / "vocab.txt").write_text("\n".join(words))
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    BertModel(BertConfig(vocab_size=len(words), **sizes), add_pooling_layer=False).save_pretrained(folder)
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def run(folder: Path, *options: str) -> dict[str, str]:
    """Train 12 steps; digests of the adapter's tensors and of the logged losses."""
    settings = {"model": make_model(folder / "model"), "data": make_data(folder / "data"), "output": folder / "run"}
    settings |= {"max-steps": 12, "batch-size": 8, "max-length": 8, "dropout": 0.1, "save-steps": 0}
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    main([*flags, "--quiet", *options])
    tensors = load_file(folder / "run" / "adapter" / "adapter_model.safetensors")
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode() + tensors[key].contiguous().numpy().tobytes())
    history = json.loads((folder / "run" / "metrics.json").read_text())["history"]
    losses = [{key: value for key, value in entry.items() if "loss" in key} for entry in history]
    return {"adapter": digest.hexdigest(), "losses": json.dumps(losses)}


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), *sys.argv[2:])))
