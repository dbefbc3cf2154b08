"""Checks on a checkpoint's tensors before any of them is loaded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def check_adapter_state(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint that is not of this adapter: nothing has been loaded yet.

    Args:
        expected: the tensors of the model that are its adapter's, ``modules_to_save`` included, by their key there.
        found: the checkpoint's tensors.

    Raises:
        ValueError: missing tensors, tensors of another shape (another pyramid or rank), integers in place
            of numbers, or values that are not finite in fp32.
    """
    missing = sorted(set(expected) - set(found))
    wrong = [
        f"{key} is {list(found[key].shape)} in the checkpoint, {list(tensor.shape)} in this model"
        for key, tensor in expected.items()
        if key in found and found[key].shape != tensor.shape
    ]
    extra = sorted(key for key in found if ".ept_adapters." in key and key not in expected)
    if missing or wrong or extra:
        details = (
            wrong + [f"{key} is missing" for key in missing] + [f"{key} has no place in this model" for key in extra]
        )
        shown = "; ".join(details[:3]) + (f"; and {len(details) - 3} more" if len(details) > 3 else "")
        raise ValueError(f"the checkpoint was made for another pyramid, rank, set of tasks or model: {shown}")
    for key, tensor in expected.items():
        if found[key].is_floating_point() != tensor.is_floating_point():
            raise ValueError(
                f"the checkpoint holds {key} as {found[key].dtype}, not {tensor.dtype}; nothing was loaded"
            )
        # A module that somebody else wrote may well keep an infinity, in a mask; no one keeps NaN.
        broken = torch.isnan if ".modules_to_save." in key else lambda values: ~torch.isfinite(values)
        if broken(found[key].float()).any():
            raise ValueError(f"the checkpoint holds values that are not finite in {key}; nothing was loaded")
