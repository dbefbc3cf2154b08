"""An adapter without the experts that no task uses."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from ept_kernels import PyramidGeometry

from ..config import EPTConfig, shared_and_pattern
from ..files import read_json, write_atomically, write_json
from ..saved import (
    LAYER_MARK,
    MODEL_PREFIX,
    AdapterError,
    SavedAdapter,
    read_adapter,
)
from .experts import SavedPyramid, saved_pyramid, task_gates


@dataclass(frozen=True)
class Pruned:
    """What ``prune_experts`` wrote. ``experts`` and ``parameters``: ``(before, after)``, in all layers together."""

    folder: Path
    experts: tuple[int, int]
    parameters: tuple[int, int]


def prune_experts(source: str | Path, output: str | Path) -> Pruned:
    """Write a copy of a saved EPT adapter without the experts that no task uses, layer by layer.

    Outputs of all tasks stay the same, but for the rounding of a product with a smaller gate (measured: at most 1e-6 of
    the update). Kernels and gate rows go; where a layer's smallest scale goes, so does the part of the seed that only
    this scale reads, and the kernels that stay take up the change of the dimension-aware scale ``s_k``. Layers then
    differ, which ``EPTConfig.kernel_pattern`` says. Training on from there is another matter: an expert that no task
    uses today can be chosen tomorrow.

    Args:
        source: as ``read_adapter`` takes it. output: a folder that does not exist yet; other files of ``source``
            (tokenizer, tasks) are copied there.

    Raises:
        AdapterError: not an EPT adapter, one whose tokens choose experts, one with experts of added tasks, or
            ``output`` exists.
    """
    saved = read_adapter(source)
    output = Path(output)
    if not isinstance(saved.config, EPTConfig):
        raise AdapterError(f"{str(saved.folder)!r} is a {saved.method} adapter; only EPT's experts can be pruned")
    if output.exists():
        raise AdapterError(f"{str(output)!r} exists already; name a new folder")
    if saved.config.routing == "token":
        raise AdapterError(
            f"{str(saved.folder)!r} cannot be pruned: with routing='token' every token chooses among all experts, and "
            "none can be said to be unused"
        )
    if saved.config.added_kernels:
        raise AdapterError(
            f"{str(saved.folder)!r} cannot be pruned: it has experts of tasks that were added later "
            f"(added_kernels={saved.config.added_kernels}), whose places tell which tasks know them"
        )
    gates, _ = task_gates(saved)
    tensors: dict[str, Tensor] = {}
    sizes: dict[str, tuple[int, ...]] = {}
    before = 0
    for name in saved.layers:
        pyramid = saved_pyramid(saved, name)
        used = {place for weights in gates[name] for place, weight in enumerate(weights) if weight > 0}
        sizes[name], parts = _smaller(pyramid, sorted(used))
        tensors |= {f"{MODEL_PREFIX}{name}{LAYER_MARK}{part}": tensor for part, tensor in parts.items()}
        before += len(pyramid.kernels)
    kept = _rest(saved)

    def write(folder: Path) -> None:
        shutil.copytree(saved.folder, folder)
        save_file(kept | tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        write_json(folder / CONFIG_NAME, _config(saved, sizes))

    write_atomically(output, write)
    layers = sum(tensor.numel() for parts in saved.layers.values() for tensor in parts.values())
    rest = sum(tensor.numel() for tensor in kept.values())
    after = sum(tensor.numel() for tensor in tensors.values())
    return Pruned(output, (before, sum(map(len, sizes.values()))), (layers + rest, after + rest))


def _smaller(pyramid: SavedPyramid, used: Sequence[int]) -> tuple[tuple[int, ...], dict[str, Tensor]]:
    """Kernel sizes and tensors of a layer of the experts ``used``, and one of the smallest scale where it has to stay.

    The files do not hold the layer's exact sizes. Where these decide how much of the seed the next larger scale reads,
    the smallest scale stays.
    """
    geometry = pyramid.geometry
    keep = list(used)
    factors = _changed_factors(geometry, keep)
    if factors is None:
        keep = sorted({*keep, geometry.kernel_sizes.index(geometry.scales[0])})
        factors = [1.0] * len(keep)
    sizes = tuple(geometry.kernel_sizes[place] for place in keep)
    width, height = (-(-size // min(sizes)) for size in (geometry.in_features, geometry.out_features))
    parts = {"A": pyramid.A[:, :width], "B": pyramid.B[:height], "gate": pyramid.gate[keep]}
    for new, (old, factor) in enumerate(zip(keep, factors, strict=True)):
        parts[f"kernels.{new}"] = pyramid.kernels[old] * factor
    return sizes, {part: tensor.contiguous() for part, tensor in parts.items()}


def _changed_factors(geometry: PyramidGeometry, keep: Sequence[int]) -> list[float] | None:
    """``s_k`` before over ``s_k`` after, of each kept expert; None where it hangs on sizes that are not known."""
    sizes = tuple(geometry.kernel_sizes[place] for place in keep)
    smallest = geometry.scales[0]
    if min(sizes) == smallest:
        return [1.0] * len(sizes)
    answers = set()
    for missing in range(smallest):
        exact = [
            PyramidGeometry(
                geometry.in_features - missing,
                geometry.out_features - missing,
                geometry.rank,
                kernel_sizes,
                geometry.alp_scaling,
            )
            for kernel_sizes in (geometry.kernel_sizes, sizes)
        ]
        old, new = (dict(zip(g.scales, g.alp_factors, strict=True)) for g in exact)
        answers.add((exact[1].seed_width, exact[1].seed_height, tuple(old[k] / new[k] for k in sizes)))
    return list(answers.pop()[2]) if len(answers) == 1 else None


def _rest(saved: SavedAdapter) -> dict[str, Tensor]:
    shared = {f"base_model.ept_task_tables.{part}": tensor for part, tensor in saved.shared.items()}
    return {**shared, **saved.other}


def _config(saved: SavedAdapter, sizes: dict[str, tuple[int, ...]]) -> dict[str, object]:
    """The saved config with the commonest pyramid for all layers, and a pattern for each that differs."""
    content = read_json(saved.folder / CONFIG_NAME)
    content["kernel_sizes"], content["kernel_pattern"] = shared_and_pattern(sizes)
    return content
