"""The GPU tests: all of them marked ``gpu``, skipped with the reason where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU here (torch.cuda.is_available() is False)"))


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """fp32 products of the vendor's library in fp32. (pytest's own patches cannot restore these settings.)"""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
