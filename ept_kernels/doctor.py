"""``python -m ept_kernels``, or ``ept-doctor``: what runs here, why the rest does not, and whether it is right.

Plain text for a bug report. Every backend that serves a device here computes a small layer, forward and gradients,
beside the reference in float64 on the CPU; a wrong one, or one that raises, makes the exit status 1.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import subprocess
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import dispatch, reference
from .functional import pyramid_linear
from .geometry import PyramidGeometry

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CHECKED = ("float32", "bfloat16")
PACKAGES = ("ept-kernels", "torch", "triton", "numpy", "peft", "transformers", "accelerate")
FP32_LIMIT = 1e-5
#: In half precision an error may be so many times that of plain torch in the same dtype.
OVER_PLAIN_TORCH = 2.0

GEOMETRY = PyramidGeometry(70, 90, 8, (2, 4, 6, 8))
SAMPLES, LENGTH = 4, 24
NAMES = ("output", "grad x", "grad A", "grad B", "grad folded")


def _line(label: str, value: object) -> str:
    return textwrap.fill(
        f"{label:<15} {value}", 79, subsequent_indent=" " * 16, break_long_words=False, break_on_hyphens=False
    )


# --- the machine ------------------------------------------------------------------------------------------------------


def processor() -> str:
    """The maker's name for the CPU."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _driver() -> str:
    """What ``nvidia-smi`` says of the driver, or that there is none: torch may lack CUDA where a GPU is present."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return "nvidia-smi not found"
    query = [command, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi: {error}"
    return "; ".join((found.stdout if found.returncode == 0 else found.stdout + found.stderr).strip().splitlines())


def devices() -> list[torch.device]:
    """The CPU and every GPU that torch sees."""
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in gpus)]


def _gpu(device: torch.device) -> str:
    about = torch.cuda.get_device_properties(device)
    architecture = getattr(about, "gcnArchName", None) if torch.version.hip else f"{about.major}.{about.minor}"
    return f"{about.name}, {architecture}, {about.total_memory / 2**30:.0f} GiB"


def machine() -> Iterator[str]:
    """Lines about processor, GPUs and driver."""
    yield _line("system", f"{platform.system()} {platform.release()}, {platform.machine()}")
    threads = f"{os.cpu_count()} CPUs, torch uses {torch.get_num_threads()}"
    yield _line("processor", f"{processor()}, {threads}")
    gpus = devices()[1:]
    for device in gpus:
        yield _line(str(device), _gpu(device))
    if not gpus:
        yield _line("GPU", "none that torch can use")
    yield _line("driver", _driver())


# --- what is installed and built --------------------------------------------------------------------------------------


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "from a source tree, not installed" if package == "ept-kernels" else "not installed"


def versions() -> Iterator[str]:
    """Lines about Python, packages and the variables that steer this one."""
    yield _line("python", platform.python_version())
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"HIP {torch.version.hip}"
    for package in PACKAGES:
        found = torch.__version__ if package == "torch" else _version(package)
        if package == "torch":
            found += f", {built}" if torch.version.cuda or torch.version.hip else ", without CUDA or HIP"
        yield _line(package, found)
    for name, value in sorted(os.environ.items()):
        if name.startswith(("EPT_", "TRITON_")):
            yield _line(name, value)


def _backend(name: str) -> Any:
    return dispatch.load(name)


def _build(name: str) -> str:
    """What ``build_info`` of a backend says, or why it cannot."""
    try:
        found = _backend(name).build_info()
    except Exception as error:
        return str(error)
    return "; ".join(
        f"{key} {value if isinstance(value, str) else ' '.join(map(str, value))}" for key, value in found.items()
    )


# --- which backend serves ---------------------------------------------------------------------------------------------


def _refusal(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend does not serve ``dtype`` on ``device``, or None. A backend that cannot be imported does not."""
    try:
        backend = dispatch.load(name)
        reason = backend.unsupported(device, dtype)
        if reason is None:
            _ = backend.forward  # what is imported by the first call may fail
        return reason
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def would_serve_a_gpu(name: str) -> str | None:
    """Why a backend would refuse a GPU if there were one, as far as can be seen without; None if nothing is missing."""
    if name == "cuda":
        try:
            _backend(name).build_info()
        except Exception as error:
            return str(error)
        return None
    return _refusal(name, torch.device("cuda"), torch.float32)


def backends() -> Iterator[str]:
    """Lines: for every device and dtype the backend that is chosen, and why the others are not."""
    for device in devices():
        refusals: dict[tuple[str, str], list[str]] = {}
        for dtype_name, dtype in DTYPES.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the reasons follow
                yield _line(f"{device} {dtype_name}", f"{dispatch.automatic(device, dtype)}")
            for name in dispatch.AUTOMATIC.get(device.type, ()):
                if (reason := _refusal(name, device, dtype)) is not None:
                    refusals.setdefault((name, reason), []).append(dtype_name)
        for (name, reason), dtypes in refusals.items():
            yield _line(f"- not {name}", f"{', '.join(dtypes)}: {reason}")
    if not torch.cuda.is_available():
        for name in dispatch.AUTOMATIC["cuda"]:
            reason = would_serve_a_gpu(name)
            yield _line(f"a GPU: {name}", "would serve" if reason is None else f"would not: {reason}")


# --- whether it is right ----------------------------------------------------------------------------------------------


@contextmanager
def _forced(backend: str) -> Iterator[None]:
    before = os.environ.get("EPT_BACKEND")
    os.environ["EPT_BACKEND"] = backend
    try:
        yield
    finally:
        del os.environ["EPT_BACKEND"]
        if before is not None:
            os.environ["EPT_BACKEND"] = before


def _problem() -> dict[str, Tensor]:
    """Random tensors of a small layer, float64 on the CPU; outputs are of order one."""
    generator, g = torch.Generator().manual_seed(0), GEOMETRY

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return std * torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "x": normal(SAMPLES, LENGTH, g.in_features),
        "A": normal(g.rank, g.seed_width, std=g.seed_width**-0.5),
        "B": normal(g.seed_height, g.rank, std=g.rank**-0.5),
        "folded": normal(3, g.folded_size, std=0.5),
        "weight": normal(g.out_features, g.in_features, std=g.in_features**-0.5),
        "bias": normal(g.out_features),
        "cotangent": normal(SAMPLES, LENGTH, g.out_features),
    }


def _evaluate(function, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients. Rows, weight and bias are of ``dtype``, the adapter of fp32 or wider."""
    wide = torch.promote_types(dtype, torch.float32)
    tensors = {
        name: value.to(wide if name in ("A", "B", "folded") else dtype).to(device) for name, value in _problem().items()
    }
    leaves = [tensors[name].requires_grad_() for name in ("x", "A", "B", "folded")]
    x, A, B, folded = leaves
    groups = torch.tensor([2, 0, 1, 0], device=device)
    output = function(x, tensors["weight"], tensors["bias"], A, B, folded, groups, GEOMETRY)
    gradients = torch.autograd.grad(output, leaves, tensors["cotangent"])
    return [value.detach().double().cpu() for value in (output, *gradients)]


def relative_errors(found: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """``||found - exact|| / ||exact||`` of each pair; infinite where something is not finite."""
    errors = [((f.double() - e).norm() / e.norm()).item() for f, e in zip(found, exact, strict=True)]
    return [error if error == error else float("inf") for error in errors]


def check(backend: str, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether a backend that serves ``dtype`` on ``device`` agrees with the reference, and the errors in words."""
    cpu = torch.device("cpu")
    exact = _evaluate(reference.pyramid_linear, cpu, torch.float64)
    limits = [FP32_LIMIT] * len(exact)
    if dtype != torch.float32:
        plain = relative_errors(_evaluate(reference.pyramid_linear, cpu, dtype), exact)
        limits = [OVER_PLAIN_TORCH * error for error in plain]
    try:
        with _forced(backend):
            errors = relative_errors(_evaluate(pyramid_linear, device, dtype), exact)
    except Exception as error:
        return False, f"{type(error).__name__}: {error}"
    wrong = [i for i, (error, limit) in enumerate(zip(errors, limits, strict=True)) if not error <= limit]
    if wrong:
        return False, ", ".join(f"{NAMES[i]} {errors[i]:.1e} > {limits[i]:.1e}" for i in wrong)
    return True, f"forward {errors[0]:.1e}, gradients {max(errors[1:]):.1e}"


def checks() -> Iterator[tuple[bool, str]]:
    """``check`` of whatever serves here, as ``(right, line)``."""
    for device in devices():
        for dtype_name in CHECKED:
            for name in dispatch.available_backends():
                if name != "reference" and _refusal(name, device, DTYPES[dtype_name]) is None:
                    right, words = check(name, device, DTYPES[dtype_name])
                    yield right, f"{device} {dtype_name:<9} {name:<7} {'ok   ' if right else 'WRONG'} {words}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report. Exit status: 0, or 1 where a backend that serves is wrong."""
    parser = argparse.ArgumentParser(
        prog="ept-doctor",
        description="What runs here, why the rest does not, and whether it is right: text for a bug report.",
    )
    parser.parse_args(arguments)
    for title, lines in (("machine", machine), ("versions", versions)):
        print(f"-- {title}", *lines(), sep="\n")
    print("-- built", _line("cpu", _build("cpu")), _line("cuda", _build("cuda")), sep="\n")
    print("-- backends", *backends(), sep="\n")
    print("-- checks against the reference in float64 (relative errors)", flush=True)
    all_right = True
    for right, line in checks():
        print(textwrap.fill(line, 79, subsequent_indent="  ", break_long_words=False), flush=True)
        all_right &= right
    print("all right" if all_right else "WRONG: please report this, with all of the text above")
    return 0 if all_right else 1
