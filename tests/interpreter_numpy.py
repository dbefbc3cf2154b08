"""Triton's interpreter up to 3.6 on numpy 2.4 and newer, which no longer makes an int of an array of one element."""

from __future__ import annotations

import numpy as np
import triton
from triton.runtime import interpreter


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def repair() -> None:
    """Let a loop's bound be a tensor of one element, as Triton 3.7 does; nothing where that works already."""
    if _version(triton.__version__) >= (3, 7) or _version(np.__version__) < (2, 4):
        return
    original = interpreter._patch_lang_tensor

    def patched(tensor: type, *scope: object) -> None:
        original(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    interpreter._patch_lang_tensor = patched
