"""Writes the golden files. They were made once; only a method that is added gets new ones: ``make.py NAME...``."""

from __future__ import annotations

import ast
import copy
import importlib.util
import json
import pkgutil
import sys
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ept
import ept_kernels
from tests.golden import cases


def awaken(module: nn.Module, seed: int) -> None:
    """Values other than the initial ones for all that trains."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)


def save_base() -> None:
    torch.manual_seed(0)
    base = cases.base_model()
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.3)
    save_file(base.state_dict(), cases.HERE / "base.safetensors")


def save_adapter(name: str) -> None:
    saved = cases.ADAPTERS[name]
    base = cases.base_model()
    base.load_state_dict(load_file(cases.HERE / "base.safetensors"))
    torch.manual_seed(1)
    model = peft.get_peft_model(copy.deepcopy(base), saved.make())
    awaken(model, 2)
    if saved.prepare is not None:
        saved.prepare(model)
        awaken(model, 3)
    model.eval()
    with torch.no_grad():
        logits = model(**cases.batch(), task_ids=saved.task_ids).logits
    folder = cases.HERE / "adapters" / name
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    save_file({"logits": logits}, folder / "expected.safetensors")


def save_layer(name: str) -> None:
    torch.manual_seed(1)
    layer = cases.make_layer(name)
    awaken(layer, 2)
    if name == "tucka":  # its router makes its centroids from the first batch
        with torch.no_grad():
            layer.train()(cases.layer_input())
    layer.eval()
    with torch.no_grad():
        output = layer(cases.layer_input(), torch.tensor([3, 0, 2, 0]))
    folder = cases.HERE / "layers"
    folder.mkdir(exist_ok=True)
    save_file({**layer.state_dict(), "expected": output}, folder / f"{name}.safetensors")


def public_names() -> dict[str, list[str]]:
    """Module -> the public names that it defines or lists in ``__all__``."""
    found = {}
    for package in (ept, ept_kernels):
        modules = [package.__name__]
        modules += [info.name for info in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
        for module in modules:
            spec = importlib.util.find_spec(module)
            if spec is None or not (spec.origin or "").endswith(".py") or module.endswith("__main__"):
                continue  # a compiled backend, or a command
            tree = ast.parse(Path(str(spec.origin)).read_text())
            names: set[str] = set()
            for node in tree.body:
                if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                    names.add(node.name)
                for target in node.targets if isinstance(node, ast.Assign) else ():
                    if isinstance(target, ast.Name) and target.id == "__all__":
                        names.update(ast.literal_eval(node.value))
                    names.update(n.id for n in ast.walk(target) if isinstance(n, ast.Name))
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    names.add(node.target.id)
            found[module] = sorted(name for name in names if not name.startswith("_"))
    return found


if __name__ == "__main__":
    wanted = sys.argv[1:]
    if not wanted:
        save_base()
        names = json.dumps(public_names(), indent=0, sort_keys=True)
        (cases.HERE / "public_names.json").write_text(names + "\n")
    for name in wanted or cases.ADAPTERS:
        save_adapter(name)
    for name in wanted or cases.LAYERS:
        if name in cases.LAYERS:
            save_layer(name)
