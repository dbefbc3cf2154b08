"""What interpreted kernels do: launches, the bytes of every tensor that they touch, and whether they may touch them.

``traced()`` watches every load and store. It raises if a kernel reads or writes an address that belongs to no tensor it
was given, writes an element from two programs or twice in one store, or reads in one program what another program of
the same launch writes: on a GPU such a launch has no defined result, while the interpreter, which runs programs one
after the other, would hide it. A program may read what another one wrote before it set a flag (an atomic exchange with
release semantics), once it has polled that flag (an atomic with acquire semantics).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.runtime.interpreter import InterpreterBuilder, interpreter_builder

from ept_kernels.triton import launch as launcher

NOBODY, MANY = -1, -2


@dataclass
class Touched:
    """One tensor argument of one launch.

    Attributes:
        loaded, stored: bytes moved by the programs, an element once for each instruction that asks for it.
        writer, reader: program that wrote, or read, each element of the memory that the tensor spans.
    """

    tensor: torch.Tensor
    loaded: int = 0
    stored: int = 0
    writer: np.ndarray | None = field(default=None, repr=False)
    reader: np.ndarray | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        spans = [(size - 1) * stride for size, stride in zip(self.tensor.shape, self.tensor.stride(), strict=True)]
        self.item = self.tensor.element_size()
        self.start = self.tensor.data_ptr()
        self.elements = sum(spans) + 1 if self.tensor.numel() else 0

    def find(self, addresses: np.ndarray) -> np.ndarray:
        """Which of ``addresses`` lie in the memory that the tensor spans."""
        return (addresses >= self.start) & (addresses < self.start + self.elements * self.item)

    def places(self, addresses: np.ndarray) -> np.ndarray:
        """Positions of ``addresses`` that hold elements of the tensor, or an error: between them is foreign memory."""
        offsets = (addresses - np.uint64(self.start)).astype(np.int64)
        places, rest = offsets // self.item, offsets % self.item
        left = places.copy()
        for stride, size in sorted(zip(self.tensor.stride(), self.tensor.shape, strict=True), reverse=True):
            if stride:
                left -= np.minimum(left // stride, size - 1) * stride
        assert not rest.any() and not left.any(), "an address between the elements of a view"
        return places


@dataclass
class Launched:
    """One launch: its kernel's name, grid, compile-time arguments and tile configuration, and what it touched."""

    kernel: str
    grid: tuple[int, ...]
    constants: dict[str, Any]
    config: launcher.Config
    tensors: dict[str, Touched]

    @property
    def loaded(self) -> dict[str, int]:
        return {name: touched.loaded for name, touched in self.tensors.items() if touched.loaded}

    @property
    def stored(self) -> dict[str, int]:
        return {name: touched.stored for name, touched in self.tensors.items() if touched.stored}


class Trace:
    """Collects ``launches``; ``run`` replaces the launcher's runner."""

    def __init__(self) -> None:
        self.launches: list[Launched] = []
        self._current: Launched | None = None
        self._released: dict[int, int] = {}  # flag's address: the program that set it
        self._seen: dict[int, set[int]] = {}  # program: those whose flags it has polled

    @property
    def kernels(self) -> list[str]:
        return [launched.kernel for launched in self.launches]

    def assert_written_once(self) -> None:
        """Every element of a tensor that a launch writes to is written, and once: poisoned memory hides a lost NaN."""
        for launched in self.launches:
            for name, count in launched.stored.items():
                tensor = launched.tensors[name].tensor
                assert count == tensor.numel() * tensor.element_size(), f"{launched.kernel}: {name}"

    def run(self, kernel: Any, grid: tuple[int, ...], arguments: tuple, constants: dict[str, Any], config) -> None:
        named = zip(kernel.arg_names, arguments, strict=False)
        tensors = {name: Touched(value) for name, value in named if isinstance(value, torch.Tensor)}
        self._current = Launched(kernel.__name__, grid, constants, config, tensors)
        self.launches.append(self._current)
        try:
            launcher.run(kernel, grid, arguments, constants, config)
        finally:
            for touched in self._current.tensors.values():
                touched.writer = touched.reader = None
            self._current = None
            self._released.clear()
            self._seen.clear()

    def load(self, pointers: np.ndarray, mask: np.ndarray) -> None:
        program = self._program()
        for touched, addresses in self._by_tensor(pointers, mask):
            places = np.unique(touched.places(addresses))
            touched.loaded += len(places) * touched.item
            if touched.reader is None:
                touched.reader = np.full(touched.elements, NOBODY, np.int32)
            known = touched.reader[places]
            touched.reader[places] = np.where((known == NOBODY) | (known == program), program, MANY)
            if touched.writer is not None:
                others = set(np.unique(touched.writer[places]).tolist()) - {NOBODY, program}
                unknown = others - self._seen.get(program, set())
                assert not unknown, f"{self._current.kernel}: {program} reads what {unknown} may not have written"

    def store(self, pointers: np.ndarray, mask: np.ndarray) -> None:
        program = self._program()
        for touched, addresses in self._by_tensor(pointers, mask):
            places = touched.places(addresses)
            touched.stored += len(places) * touched.item
            if touched.writer is None:
                touched.writer = np.full(touched.elements, NOBODY, np.int32)
            assert len(np.unique(places)) == len(places), f"{self._current.kernel} writes twice in one store"
            others = touched.writer[places]
            assert ((others == NOBODY) | (others == program)).all(), f"{self._current.kernel}: two programs write"
            assert program not in self._released.values(), f"{self._current.kernel} writes after it has set its flag"
            touched.writer[places] = program
            if touched.reader is not None:
                others = touched.reader[places]
                assert ((others == NOBODY) | (others == program)).all(), (
                    f"{self._current.kernel}: another program reads"
                )

    def atomic(self, operation: str, pointers: np.ndarray, semantics: str) -> None:
        program = self._program()
        for address in pointers.ravel().tolist():
            if operation == "XCHG" and "RELEASE" in semantics:
                self._released[address] = program
            elif "ACQUIRE" in semantics and address in self._released:
                self._seen.setdefault(program, set()).add(self._released[address])

    def _program(self) -> int:
        x, y, z = interpreter_builder.grid_idx
        _, height, depth = interpreter_builder.grid_dim
        return (x * height + y) * depth + z

    def _by_tensor(self, pointers: np.ndarray, mask: np.ndarray) -> Iterator[tuple[Touched, np.ndarray]]:
        addresses = pointers[np.broadcast_to(mask != 0, pointers.shape)].ravel()
        for touched in self._current.tensors.values():
            if not len(addresses):
                return
            inside = touched.find(addresses)
            if inside.any():
                yield touched, addresses[inside]
                addresses = addresses[~inside]
        assert not len(addresses), f"{self._current.kernel} leaves its tensors, program {interpreter_builder.grid_idx}"


@contextlib.contextmanager
def traced() -> Iterator[Trace]:
    """Inside, every launch is recorded and every memory access checked."""
    trace = Trace()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    atomic = InterpreterBuilder.create_atomic_rmw

    def checked_load(self, pointers, mask, *rest, **named):
        trace.load(pointers.data, mask.data)
        return load(self, pointers, mask, *rest, **named)

    def checked_store(self, pointers, value, mask, *rest, **named):
        trace.store(pointers.data, mask.data)
        return store(self, pointers, value, mask, *rest, **named)

    def watched_atomic(self, operation, pointers, value, mask, semantics, scope):
        trace.atomic(operation.name, pointers.data, semantics.name)
        return atomic(self, operation, pointers, value, mask, semantics, scope)

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", checked_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", checked_store),
        mock.patch.object(InterpreterBuilder, "create_atomic_rmw", watched_atomic),
        mock.patch.object(launcher, "runner", trace.run),
    ):
        yield trace
