"""A small adapted model of every method that merges, and the many ways in which its saved folder can be broken."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ept

from .support import ODD_VALUES

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Net(nn.Module):
    """Two layers to adapt and a head that is trained and saved beside the adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(12, 10), nn.Linear(10, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()))


COMMON: dict[str, Any] = {"target_modules": ["first", "second"], "modules_to_save": ["head"], "num_tasks": 3}
CONFIGS: dict[str, Callable[[], ept.EPTConfig]] = {
    "ept": lambda: ept.EPTConfig(r=2, kernel_sizes=(2, 3, 3), task_embedding_dim=4, **COMMON),
    "added task": lambda: ept.EPTConfig(r=2, kernel_sizes=(2, 3, 3), task_embedding_dim=4, **COMMON),
    "moelora": lambda: ept.MOELoRAConfig(r=4, num_experts=2, task_embedding_dim=4, **COMMON),
    "more": lambda: ept.MoREConfig(r=3, task_embedding_dim=4, **COMMON),
    "dcft": lambda: ept.DCFTConfig(kernel_size=2, **COMMON),
    "tucka": lambda: ept.TuckAConfig(r=2, **COMMON),
}


def make_base() -> Net:
    torch.manual_seed(5)
    return Net().eval()


def make(name: str) -> peft.PeftModel:
    model = peft.get_peft_model(make_base(), CONFIGS[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
        if name == "tucka":
            model.train()(x=inputs(), task_ids=0)  # draws the centroids
    if name == "added task":
        model.base_model.add_task()
    return model.eval()


def inputs() -> Tensor:
    return torch.randn(3, 12, generator=torch.Generator().manual_seed(1))


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(x=inputs(), task_ids=torch.tensor([0, 2, 1]))


# --- broken weights ---------------------------------------------------------------------------------------------------


def _truncate(data: bytes, rng: random.Random) -> bytes:
    header = 8 + struct.unpack("<Q", data[:8])[0]
    place = rng.choice((0, rng.randrange(8), rng.randrange(8, header), header, rng.randrange(header, len(data))))
    return data[: rng.choice((place, len(data) - 1))]


def _flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    end = rng.choice((8, 8 + struct.unpack("<Q", data[:8])[0], len(data)))
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _declare(data: bytes, rng: random.Random) -> bytes:
    """A header that says something else of a tensor: its size, place or dtype."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    entry = header[rng.choice([key for key in header if key != "__metadata__"])]
    huge = rng.choice((2**31, 2**40, 2**62, 2**64, -1, 10**30))
    change = rng.choice(("shape", "offsets", "both", "dtype", "length", "nothing there"))
    if change in ("shape", "both"):
        entry["shape"] = [huge, *entry["shape"][1:]]
    if change in ("offsets", "both"):
        entry["data_offsets"] = rng.choice(([0, huge], [huge, huge + 4], [8, 4], [0, 0], ["0", None]))
    if change == "dtype":
        entry["dtype"] = rng.choice(("F64", "F16", "I32", "BOOL", "pickle", "../x", None, 7, "F8_E4M3", "C64"))
    if change == "nothing there":
        entry.clear()
    text = json.dumps(header).encode()
    size = len(text) if change != "length" else rng.choice((0, 1, huge % 2**64, len(data) * 2))
    return struct.pack("<Q", size) + text + data[8 + length :]


def _replace(data: bytes, rng: random.Random) -> bytes:
    nested = b'{"a":' * 20000 + b"1" + b"}" * 20000
    return rng.choice((b"", b"\0" * 64, rng.randbytes(200), b"PK\3\4" + data, struct.pack("<Q", len(nested)) + nested))


def _rewrite(folder: Path, rng: random.Random, change: Callable[[dict[str, Tensor], str], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors, rng.choice(sorted(tensors)))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / WEIGHTS)


def break_weights(folder: Path, rng: random.Random) -> str:
    """Breaks the file of the weights in one way, which it names."""
    path = folder / WEIGHTS
    as_bytes = {"truncated": _truncate, "flipped": _flip, "declared": _declare, "replaced": _replace}
    dtypes = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool, torch.complex64)
    odd = {
        "missing": lambda tensors, key: tensors.pop(key),
        "renamed": lambda tensors, key: tensors.update({rng.choice((f"{key}x", f"../{key}", "")): tensors.pop(key)}),
        "extra": lambda tensors, key: tensors.update({f"{key}.more": torch.ones(2)}),
        "extra elsewhere": lambda tensors, key: tensors.update({"base_model.model.first.weight": torch.ones(10, 12)}),
        "transposed": lambda tensors, key: tensors.update(
            {key: tensors[key].mT if tensors[key].dim() > 1 else tensors[key]}
        ),
        "longer": lambda tensors, key: tensors.update(
            {
                key: tensors[key].repeat(2, *[1] * (tensors[key].dim() - 1))
                if tensors[key].dim()
                else tensors[key].repeat(2)
            }
        ),
        "flat": lambda tensors, key: tensors.update({key: tensors[key].reshape(-1)}),
        "empty": lambda tensors, key: tensors.update({key: tensors[key].reshape(-1)[:0]}),
        "dtype": lambda tensors, key: tensors.update({key: tensors[key].to(rng.choice(dtypes))}),
        "not finite": lambda tensors, key: tensors.update(
            {key: tensors[key] * rng.choice((float("nan"), float("inf")))}
        ),
    }
    kind = rng.choice((*as_bytes, *as_bytes, *odd))
    if kind in as_bytes:
        path.write_bytes(as_bytes[kind](path.read_bytes(), rng))
    else:
        _rewrite(folder, rng, odd[kind])
    return kind


# --- broken configs ---------------------------------------------------------------------------------------------------


def _json_able(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


ODD_JSON = tuple(value for value in ODD_VALUES if _json_able(value))


def break_config(folder: Path, rng: random.Random) -> str:
    """Breaks the config in one way, which it names."""
    path = folder / CONFIG
    text = path.read_text()
    content = json.loads(text)
    kind = rng.choice(
        ("field", "field", "field", "removed", "unknown", "truncated", "bytes", "nested", "other", "path")
    )
    if kind == "field":
        name = rng.choice([key for key in content if key != "peft_type"])
        content[name] = rng.choice(ODD_JSON)
        kind = f"field {name}"
    elif kind == "removed":
        content.pop(rng.choice(sorted(content)))
    elif kind == "unknown":
        content[rng.choice(("surprise", "__class__", "trust_remote_code", "auto_map"))] = rng.choice(ODD_JSON)
    elif kind == "path":
        content[rng.choice(("base_model_name_or_path", "revision", "peft_version"))] = "../../../etc/passwd"
    elif kind == "truncated":
        path.write_text(text[: rng.randrange(len(text))])
        return kind
    elif kind == "bytes":
        changed = bytearray(text.encode())
        changed[rng.randrange(len(changed))] = rng.randrange(256)
        path.write_bytes(bytes(changed))
        return kind
    elif kind == "nested":
        path.write_text(rng.choice(('{"r": ' + "[" * 10**5, "[" * 10**5, '{"r": 1' + "0" * 5000 + "}")))
        return kind
    else:
        path.write_text(
            rng.choice(("", "[]", "null", "3", '"text"', "{}", '{"peft_type": "NOSUCH"}', '{"peft_type": []}'))
        )
        return kind
    path.write_text(json.dumps(content))
    return kind
