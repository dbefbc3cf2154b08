"""The C interface: structs as Python sees them, errors by name, and why a library is refused."""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cuda_on_cpu.build import SOURCES, run

from ept_kernels.backends import cuda_library
from ept_kernels.backends.cuda_library import FUNCTIONS


def _fields(struct: type[ctypes.Structure]) -> Iterator[tuple[str, int, int]]:
    """``(what C++ calls it, offset, size)`` of every field, nested ones too."""
    for name, kind in struct._fields_:
        field = getattr(struct, name)
        yield f"{struct.__name__}, {name}", field.offset, field.size
        if issubclass(kind, ctypes.Structure):
            yield from _fields(kind)


def test_fields_are_where_the_header_has_them(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed: the structs were not compared")
    expected = dict.fromkeys(entry for params in FUNCTIONS.values() for entry in _fields(params))
    structs = dict.fromkeys(name.split(",")[0] for name, _, _ in expected)
    lines = [f'print("{name}", offsetof({name}), sizeof({name.replace(", ", "::")}));' for name, _, _ in expected]
    lines += [f'print("{name}", 0, sizeof({name}));' for name in structs]
    source = tmp_path / "fields.cpp"
    source.write_text(f"""
#include <cstddef>
#include <cstdio>
#include "params.h"
using namespace ept::cuda;
void print(const char* name, size_t offset, size_t size) {{ std::printf("%s %zu %zu\\n", name, offset, size); }}
int main() {{
  {chr(10).join(lines)}
  std::printf("%d %d %d\\n", kInterface, kInlineScales, kMostExperts);
}}
""")
    run(["g++", "-std=c++20", "-I", SOURCES, source, "-o", tmp_path / "fields"])
    printed = subprocess.run([tmp_path / "fields"], capture_output=True, text=True, check=True).stdout.splitlines()
    sizes = {params.__name__: ctypes.sizeof(params) for params in (*FUNCTIONS.values(), *_nested())}
    ours = [f"{name} {offset} {size}" for name, offset, size in expected]
    ours += [f"{name} 0 {sizes[name]}" for name in structs]
    constants = (cuda_library.INTERFACE, cuda_library.INLINE_SCALES, cuda_library.MOST_EXPERTS)
    assert printed == [*ours, " ".join(map(str, constants))]


def _nested() -> tuple[type[ctypes.Structure], ...]:
    return cuda_library.Pyramid, cuda_library.Experts


def test_a_library_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"missing\.so has not been built; build it with EPT_BUILD_CUDA=1"):
        cuda_library.build_info(tmp_path / "missing.so")


def test_a_library_that_is_none(tmp_path: Path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    with pytest.raises(RuntimeError, match=r"broken\.so does not load: "):
        cuda_library.build_info(broken)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extern int answer; int answer = 42;", "does not load: .*ept_sizes"),
        (
            "extern const int ept_sizes[9]; const int ept_sizes[9] = {1, 8};",
            r"of another version .* \[1, 8, 0.* instead of",
        ),
    ],
    ids=["another library", "another version"],
)
def test_a_library_with_another_interface(text: str, message: str, build, tmp_path: Path) -> None:
    source, target = tmp_path / "other.cpp", tmp_path / "other.so"
    source.write_text(f'extern "C" {{ {text} }}')
    run(["g++", "-shared", "-fPIC", source, "-o", target])
    with pytest.raises(RuntimeError, match=message):
        cuda_library.build_info(target)


def test_the_library_says_what_it_was_compiled_for(library: Path) -> None:
    """The one at hand for no GPU at all; ``test_nvcc`` reads what nvcc made."""
    assert cuda_library.build_info(library) == {"architectures": [], "compiler": "no nvcc"}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_packed_fields_are_the_fields_of_the_struct(function: str) -> None:
    """A different number for each, so that none can stand for another."""
    params = FUNCTIONS[function]()
    fields = []
    for i, (name, kind) in enumerate(params._fields_, start=1):
        scalar = not issubclass(kind, (ctypes.Structure, ctypes.Array))
        fields.append(i if scalar else bytes([i] * ctypes.sizeof(kind)))
        setattr(params, name, i if scalar else kind.from_buffer_copy(fields[-1]))
    packed = cuda_library.PACKERS[function](*fields)
    assert packed == bytes(params)


@pytest.mark.usefixtures("cuda")
def test_an_error_has_a_name() -> None:
    """More rows than a grid has blocks for: nothing is touched."""
    with pytest.raises(
        RuntimeError,
        match=r"ept_dropout failed on cpu: cudaErrorInvalidConfiguration \(invalid configuration argument\)",
    ):
        cuda_library.launch("ept_dropout", torch.zeros(1), 0, 0, 0, 2**40, 4, 4, 4, 0, 1.0, 0, 0)


@pytest.mark.usefixtures("cuda")
def test_the_fields_of_another_struct_are_refused() -> None:
    with pytest.raises(struct.error):
        cuda_library.launch("ept_core", torch.zeros(1), 0, 0, 0, 2**40, 4, 4, 4, 0, 1.0, 0, 0)


def test_a_gpu_that_the_library_has_no_code_for(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told before anything is launched, by the runtime's own name for it."""

    class Probed:
        def __getattr__(self, name: str):
            return getattr(opened, name)

        def ept_probe(self) -> int:
            return 9

    opened = cuda_library._open(library)
    monkeypatch.setattr(cuda_library, "_open", lambda path: Probed())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "device", torch.device)
    reason = cuda_library.unsupported(torch.device("cuda"), torch.bfloat16)
    assert reason.startswith("_cuda.so does not run on a GPU: cudaErrorInvalidConfiguration")


def test_sources_know_no_torch_and_no_python() -> None:
    for source in SOURCES.iterdir():
        text = source.read_text()
        assert "#include <torch" not in text, source.name
        assert "Python.h" not in text, source.name
