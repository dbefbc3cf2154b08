"""Exports are judged where ``ept`` cannot be imported, by logits that were computed where it can."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import torch
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

_BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ept", "ept_kernels"):
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Block())
try:
    import ept
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("ept can be imported")
import torch
from safetensors.torch import load_file, save_file
batch = load_file(sys.argv[1])
with torch.no_grad():
    save_file({"result": result(batch).contiguous()}, sys.argv[2])
"""


def without_ept(function: str, batch: dict[str, Tensor], folder: Path) -> Tensor:
    """What ``result(batch)``, defined by the source ``function``, returns in a process that cannot import ``ept``."""
    given, wanted = folder / "batch.safetensors", folder / "result.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in batch.items()}, given)
    head, tail = _BLOCK.split("import torch\n", 1)
    script = head + textwrap.dedent(function) + "\nimport torch\n" + tail
    done = subprocess.run(
        [sys.executable, "-c", script, str(given), str(wanted)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return load_file(wanted)["result"]


def bits(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all that a model holds."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


def train_heads(model: nn.Module) -> nn.Module:
    """Heads as after training: far from the base's."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ModulesToSaveWrapper):
                for parameter in module.modules_to_save.parameters():
                    parameter.add_(torch.randn_like(parameter))
    return model
