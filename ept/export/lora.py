"""``export_lora``: one task as a LoRA adapter in PEFT's format, which PEFT and LoRA servers load without ``ept``.

One task's update of one layer is two factors, ``W = lora_B @ lora_A``. EPT: with ``Kbar_k`` the task's folded kernel of
scale k (spec identity 2),

    (B_k A_k) kron Kbar_k = (B_k kron Kbar_k) (A_k kron I_k),

a product of ``[out, r k]`` and ``[r k, in]`` after the crop. Scales stand side by side: the rank is r times the sum of
the active k.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import singledispatch
from math import hypot
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, TaskType
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ept_kernels import PyramidGeometry, fold_kernels

from ..baselines.dcft import DCFTAdapter
from ..baselines.low_rank import DiagonalAdapter
from ..config import AdapterConfig, is_int
from ..layer_adapter import LayerAdapter
from ..pyramid.adapter import PyramidAdapter
from ..tuner.model import ept_model
from .parts import (
    Parts,
    check_all_in_layers,
    check_target,
    choose_adapter,
    resolve_task,
    saved_modules,
    shadow,
    take_parts,
    write_folder,
    write_head,
)


@singledispatch
def lora_factors(adapter: LayerAdapter, task: int) -> tuple[Tensor, Tensor]:
    """``(lora_A [R, in], lora_B [out, R])`` of one resolved task, with all scaling in them, in the adapter's dtype.

    R is 0 where the task has no update here.

    Raises:
        ValueError: a method that has no such factors.
    """
    raise ValueError(f"{type(adapter).__name__} has no exact LoRA factors; EPT, DCFT, MoRE and MOELoRA have")


@lora_factors.register
def _(adapter: PyramidAdapter, task: int) -> tuple[Tensor, Tensor]:
    folded, _, active = adapter.fold(task)
    return pyramid_factors(adapter.A, adapter.B, folded[0], active.reshape(-1).tolist(), adapter.geometry)


@lora_factors.register
def _(adapter: DCFTAdapter, task: int) -> tuple[Tensor, Tensor]:
    return pyramid_factors(adapter.A, adapter.B, dcft_folded(adapter), [True], adapter.geometry)


@lora_factors.register
def _(adapter: DiagonalAdapter, task: int) -> tuple[Tensor, Tensor]:
    core = adapter.core(task)[0].to(adapter.A.dtype)
    used = core != 0
    return adapter.A[used], adapter.scaling * adapter.B[:, used] * core[used]


def dcft_folded(adapter: DCFTAdapter) -> Tensor:
    """DCFT's kernel as EPT folds its own: ``[k * k]``."""
    return fold_kernels([adapter.c], adapter.c.new_ones(1, 1), adapter.scaling, adapter.geometry)[0]


def pyramid_factors(
    A: Tensor, B: Tensor, folded: Tensor, active: list[bool], geometry: PyramidGeometry
) -> tuple[Tensor, Tensor]:
    """Factors of a pyramid of scales; a scale that is not active, or whose kernel is zero, takes no rank.

    Args:
        A ``[r, w]``, B ``[h, r]``: the seed. folded: ``[folded_size]``. active: one for each of ``geometry.scales``.
    """
    rows, columns = [A.new_empty(0, geometry.in_features)], [B.new_empty(geometry.out_features, 0)]
    sizes = zip(geometry.scales, geometry.widths, geometry.heights, geometry.offsets, active, strict=True)
    for k, width, height, offset, is_active in sizes:
        kernel = folded[offset : offset + k * k].view(k, k).to(A.dtype)
        if is_active and kernel.any():
            unit = torch.eye(k, dtype=A.dtype, device=A.device)
            rows.append(torch.kron(A[:, :width], unit)[:, : geometry.in_features])
            columns.append(torch.kron(B[:height], kernel)[: geometry.out_features])
    return torch.cat(rows), torch.cat(columns, dim=1)


def singular_parts(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(U [out, m], S [m], V [m, in])`` in float64 with ``lora_B @ lora_A = U diag(S) V``, m at most their rank R.

    ``lora_B = Qb Rb`` and ``lora_A^T = Qa Ra`` leave a singular value problem of size R, not of size ``out x in``.
    """
    left, left_core = torch.linalg.qr(lora_B.double())
    right, right_core = torch.linalg.qr(lora_A.double().T)
    U, S, V = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    return left @ U, S, V @ right.T


def truncate(lora_A: Tensor, lora_B: Tensor, rank: int | None) -> tuple[Tensor, Tensor, float, float]:
    """Factors of at most ``rank``, the norm of the exact product and the norm of what they lack of it (Frobenius).

    Factors that have that rank already, and all with ``rank=None``, are returned as they are. Singular values are
    shared evenly between the two.

    Args:
        lora_A ``[R, in]``, lora_B ``[out, R]``.
    """
    exact = min(lora_A.shape[0], *lora_A.shape[1:], lora_B.shape[0])
    if rank is None or exact == 0 or rank >= lora_A.shape[0]:
        norm = torch.linalg.norm(torch.linalg.qr(lora_B.double())[1] @ lora_A.double()) if exact else torch.zeros(())
        return lora_A, lora_B, norm.item(), 0.0
    U, S, V = singular_parts(lora_A, lora_B)
    kept = min(rank, len(S))
    root = S[:kept].sqrt()
    A, B = root[:, None] * V[:kept], U[:, :kept] * root
    return A.to(lora_A.dtype), B.to(lora_B.dtype), torch.linalg.norm(S).item(), torch.linalg.norm(S[kept:]).item()


@dataclass(frozen=True)
class LoraLayer:
    """One layer of an exported LoRA.

    Attributes:
        rank: of the factors, without padding. exact_rank: of the exact ones, ``r * sum of the active k`` for EPT.
        norm: Frobenius norm of the exact update. error: of what the factors lack of it, as a share of ``norm``.
    """

    rank: int
    exact_rank: int
    norm: float
    error: float


@dataclass(frozen=True)
class LoraReport:
    """What ``export_lora`` wrote.

    Attributes:
        path: the folder. task: the task's id.
        layers: by name in the exported model.
        parameters: numbers in all factors, as written.
    """

    path: Path
    task: int
    layers: dict[str, LoraLayer]
    parameters: int

    @property
    def max_rank(self) -> int:
        """The largest rank of a layer: what a server must allow (``--max-lora-rank``)."""
        return max(1, *(layer.rank for layer in self.layers.values()))  # PEFT has no rank 0

    @property
    def error(self) -> float:
        """Frobenius norm of all that is missing, as a share of that of all updates."""
        whole = hypot(*(layer.norm for layer in self.layers.values()))
        return hypot(*(layer.norm * layer.error for layer in self.layers.values())) / whole if whole else 0.0


def export_lora(
    model: nn.Module,
    task: int | str | None,
    path: str | Path,
    rank: int | None = None,
    *,
    adapter_name: str | None = None,
    rank_pattern: bool = False,
    overwrite: bool = False,
) -> LoraReport:
    """Write one task as a LoRA: ``adapter_config.json`` and ``adapter_model.safetensors`` of PEFT.

    An EPT task with active scales k is exactly a LoRA of rank ``r * sum of k``, and so are tasks of DCFT, MoRE and
    MOELoRA at ranks of their own. All scaling is in the factors: ``lora_alpha`` is the rank. Ranks differ by layer, so
    the factors are padded with zeros to the largest: some readers scale by ``lora_alpha`` over the rank of a layer's
    tensors (llama.cpp), others by ``lora_alpha / r`` (vLLM). The base may be quantised.

    Trained modules (``modules_to_save``) are written as PEFT writes them. For a base with ``export_parts`` the adapter
    is one of its encoder, and the task's head lies beside it: see ``export_merged``.

    Args:
        model: a ``PeftModel`` of one of this package's methods.
        task: id or name; None where there is one task.
        path: folder to write. It appears complete or not at all.
        rank: None for the exact factors; else the most that a layer may have, the rest being cut off by a singular
            value decomposition.
        adapter_name: default: the active one.
        rank_pattern: write every layer at its own rank, for readers that know ``rank_pattern`` and ``alpha_pattern``
            (PEFT): smaller files. A layer without an update gets zero factors of rank 1.
        overwrite: replace the whole folder where it is not empty.

    Raises:
        ValueError: rank below 1, a method without such factors (MixLoRA, TuckA, token-level routing), an unknown task,
            an adapter that is not there, or values that are not finite.
        FileExistsError: a file, or a folder with content.
    """
    if rank is not None and not (is_int(rank) and rank >= 1):
        raise ValueError(f"rank must be None or an integer >= 1, got {rank!r}")
    tuner = ept_model(model)
    name = choose_adapter(tuner, adapter_name)
    check_all_in_layers(tuner, name, "export_lora")
    resolved = resolve_task(tuner, name, task)
    target = check_target(path, overwrite)
    base = shadow(tuner, name)
    saved = saved_modules(base, name)
    parts = take_parts(base.unload(), saved, resolved)
    factors, layers = {}, {}
    for layer, adapter in tuner.adapters(name).items():
        layer = parts.inside(layer, "layer")
        with torch.no_grad():
            layers[layer], *factors[layer] = _layer(*lora_factors(adapter, resolved), rank)
        if not all(factor.isfinite().all() for factor in factors[layer]):
            raise ValueError(f"layer {layer!r} has an update that is not finite; nothing was written")
    ranks = {layer: max(1, found.rank) for layer, found in layers.items()}  # PEFT has no rank 0
    if not rank_pattern:
        ranks = dict.fromkeys(ranks, max(ranks.values()))
    tensors = {}
    for layer, (lora_A, lora_B) in factors.items():
        missing = ranks[layer] - len(lora_A)
        tensors[f"base_model.model.{layer}.lora_A.weight"] = F.pad(lora_A, (0, 0, 0, missing)).contiguous()
        tensors[f"base_model.model.{layer}.lora_B.weight"] = F.pad(lora_B, (0, missing)).contiguous()
    parameters = sum(tensor.numel() for tensor in tensors.values())
    tensors |= {f"base_model.model.{key}": tensor.contiguous() for key, tensor in parts.saved_tensors().items()}
    config = _config(parts, ranks, tuner.peft_config[name])

    def write(folder: Path) -> None:
        config.save_pretrained(str(folder))
        save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        write_head(folder, parts)

    return LoraReport(write_folder(target, write), resolved, layers, parameters)


def _layer(lora_A: Tensor, lora_B: Tensor, rank: int | None) -> tuple[LoraLayer, Tensor, Tensor]:
    exact_rank = len(lora_A)
    lora_A, lora_B, norm, missing = truncate(lora_A, lora_B, rank)
    return LoraLayer(len(lora_A), exact_rank, norm, missing / norm if norm else 0.0), lora_A, lora_B


def _config(parts: Parts, ranks: dict[str, int], adapted: AdapterConfig) -> LoraConfig:
    highest = max(ranks.values())  # servers size their buffers by r
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != highest}
    return LoraConfig(
        r=highest,
        lora_alpha=highest,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=_targets(parts.model, set(ranks)),
        fan_in_fan_out=all(isinstance(parts.model.get_submodule(name), Conv1D) for name in ranks),
        modules_to_save=list(parts.saved) or None,
        task_type=TaskType.FEATURE_EXTRACTION if parts.prefix else adapted.task_type,
        base_model_name_or_path=parts.name(adapted),
        revision=adapted.revision,
        inference_mode=True,
    )


def _targets(model: nn.Module, layers: set[str]) -> list[str] | str:
    """``target_modules`` that match exactly these layers: their last names (all that some servers read) if possible."""
    every = [path for path, _ in model.named_modules() if path]
    for targets in (sorted({layer.rpartition(".")[2] for layer in layers}), sorted(layers)):
        config = LoraConfig(target_modules=targets)
        if {path for path in every if check_target_module_exists(config, path)} == layers:
            return targets
    return "|".join(map(re.escape, sorted(layers)))
