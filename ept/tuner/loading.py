"""Checks on a checkpoint's tensors before any of them is loaded."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import FrameType

import torch
from torch import Tensor


def check_adapter_state(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], *, partial: bool = False, ignore_sizes: bool = False
) -> None:
    """Refuse a checkpoint that is not of this adapter: nothing has been loaded yet.

    Args:
        expected: the tensors of the model that are its adapter's, ``modules_to_save`` included, by their key there.
        found: the checkpoint's tensors.
        partial: some of the tensors may be missing. ignore_sizes: those of another shape are not checked.

    Raises:
        ValueError: missing tensors, tensors of another shape (another pyramid or rank), integers in place
            of numbers, or values that are not finite in fp32.
    """
    missing = [] if partial else sorted(set(expected) - set(found))
    shared = {key: tensor for key, tensor in expected.items() if key in found}
    wrong = {key: tensor for key, tensor in shared.items() if found[key].shape != tensor.shape}
    extra = sorted(key for key in found if ".ept_adapters." in key and key not in expected)
    if missing or extra or (wrong and not ignore_sizes):
        details = [
            f"{key} is {list(found[key].shape)} in the checkpoint, {list(tensor.shape)} in this model"
            for key, tensor in wrong.items()
        ]
        details += [f"{key} is missing" for key in missing] + [f"{key} has no place in this model" for key in extra]
        shown = "; ".join(details[:3]) + (f"; and {len(details) - 3} more" if len(details) > 3 else "")
        raise ValueError(f"the checkpoint was made for another pyramid, rank, set of tasks or model: {shown}")
    for key, tensor in shared.items():
        if key in wrong:
            continue
        if found[key].is_floating_point() != tensor.is_floating_point():
            raise ValueError(
                f"the checkpoint holds {key} as {found[key].dtype}, not {tensor.dtype}; nothing was loaded"
            )
        # Another library's module may keep an infinity, in a mask, but never NaN.
        broken = torch.isnan if ".modules_to_save." in key else lambda values: ~torch.isfinite(values)
        if broken(found[key].float()).any():
            raise ValueError(f"the checkpoint holds values that are not finite in {key}; nothing was loaded")


def loading_options() -> tuple[bool, bool]:
    """Whether PEFT's call under way reads a saved adapter, which must be whole, and whether it ignores wrong sizes.

    ``set_peft_model_state_dict`` knows both, and hands neither to the tuner that it asks to map the keys.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "set_peft_model_state_dict":
        frame = frame.f_back
    if frame is None or frame.f_back is None:
        return True, False
    return frame.f_back.f_code.co_name == "load_adapter", bool(frame.f_locals.get("ignore_mismatched_sizes", False))
