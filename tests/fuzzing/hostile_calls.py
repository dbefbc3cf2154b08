"""Calls of ``ept_kernels``' functions with arguments that somebody got wrong, each from a seed; a process of its own.

``python -m hostile_calls FIRST COUNT`` tries the seeds from FIRST on, prints each before its call, so that a crash
names it, and leaves a count of outcomes in its last line. An answer must be that of the float64 reference;
an error must be a ValueError, TypeError or IndexError that names the argument.
"""

from __future__ import annotations

import faulthandler
import json
import random
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from pyramid_testing import Case, Problem, partly_active, random_case, relative_error
from torch import Tensor

import ept_kernels
from ept.pyramid.router import route
from ept_kernels import Kept, PyramidGeometry, reference

_ROW_OPS = ("pyramid_delta", "pyramid_linear")
_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 2e-2}
#: No memory, or a size that does not fit 64 bits: torch's own errors, which name the bytes.
_TOO_LARGE = ("allocate memory", "overflow", "Storage size", "too large")


# --- what can be wrong with one argument ------------------------------------------------------------------------------


def _same(tensor: Tensor, rng: random.Random) -> Tensor:
    return tensor


def _expanded(tensor: Tensor, rng: random.Random) -> Tensor:
    return tensor[tuple(slice(0, 1) for _ in range(tensor.dim()))].expand(tensor.shape) if tensor.numel() else tensor


def _transposed(tensor: Tensor, rng: random.Random) -> Tensor:
    return tensor.movedim(0, -1).contiguous().movedim(-1, 0) if tensor.dim() > 1 else tensor


def _inside(tensor: Tensor, rng: random.Random) -> Tensor:
    """A view into a larger tensor, at an odd offset, between poison."""
    around = torch.full([size + 3 for size in tensor.shape], 99 if not tensor.is_floating_point() else float("nan"))
    view = around.to(tensor.dtype)[tuple(slice(1, 1 + size) for size in tensor.shape)]
    return view.copy_(tensor)


def _overlapping(tensor: Tensor, rng: random.Random) -> Tensor:
    strides = [rng.randrange(3) for _ in tensor.shape]
    span = 1 + sum(max(0, size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
    source = torch.randn(span).to(tensor.dtype) if tensor.is_floating_point() else torch.zeros(span, dtype=tensor.dtype)
    return source.as_strided(tensor.shape, strides)


def _negated(tensor: Tensor, rng: random.Random) -> Tensor:
    return torch._neg_view(-tensor) if tensor.is_floating_point() else tensor


def _reshaped(tensor: Tensor, rng: random.Random) -> Tensor:
    change = rng.choice(("longer", "shorter", "flat", "deeper", "scalar"))
    if change == "longer":
        return torch.cat([tensor, tensor[:1]]) if tensor.dim() else tensor[None]
    if change == "shorter":
        return tensor[:-1] if tensor.dim() else tensor[None]
    return {"flat": tensor.reshape(-1), "deeper": tensor[None], "scalar": tensor.sum()}[change]


def _other_dtype(tensor: Tensor, rng: random.Random) -> Tensor:
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.float8_e4m3fn)
    return tensor.to(rng.choice((*kinds, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool)))


def _on_meta(tensor: Tensor, rng: random.Random) -> Tensor:
    return tensor.to("meta")


def _sparse(tensor: Tensor, rng: random.Random) -> Tensor:
    return tensor.to_sparse()


def _no_tensor(tensor: Tensor, rng: random.Random) -> Any:
    return rng.choice((None, 3, 1.5, "x", [1.0], tensor.tolist() if tensor.numel() < 50 else (), torch.float32))


def _enormous(tensor: Tensor, rng: random.Random) -> Tensor:
    if not tensor.dim() or not tensor.numel():
        return tensor
    most = 2**62 // max(1, tensor[0].numel())
    return tensor[:1].expand(rng.choice((2**40, most)), *tensor.shape[1:])


def _wrong_ids(tensor: Tensor, rng: random.Random) -> Tensor:
    if tensor.is_floating_point() or not tensor.numel():
        return tensor
    wrong = tensor.clone()
    wrong.view(-1)[rng.randrange(tensor.numel())] = rng.choice((-1, -(2**63), 2**63 - 1, 10**6, 9))
    return wrong


_LAYOUTS = (_same, _expanded, _transposed, _inside, _overlapping, _negated)
_FAULTS = (_reshaped, _other_dtype, _on_meta, _sparse, _no_tensor, _enormous, _wrong_ids)


# --- one call ---------------------------------------------------------------------------------------------------------


class Wrong(AssertionError):
    """An outcome that is neither right nor a named refusal."""


def refusal(error: Exception, names: tuple[str, ...]) -> str:
    """What kind of refusal an error is; raises ``Wrong`` if it is none."""
    text = str(error)
    if isinstance(error, (RuntimeError, MemoryError)) and (
        isinstance(error, MemoryError) or any(part in text for part in _TOO_LARGE)
    ):
        return "too large"
    if isinstance(error, (ValueError, TypeError, IndexError)) and any(name in text for name in names):
        return "refused"
    raise Wrong(f"{type(error).__name__}: {text}") from error


def _check(what: str, actual: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    if actual.shape != exact.shape:
        raise Wrong(f"{what} has the shape {list(actual.shape)}, not {list(exact.shape)}")
    error = relative_error(actual, exact)
    if not error <= _TOLERANCE[dtype]:
        raise Wrong(f"{what} is {error:.1e} off in {dtype}")


def _rows_of(problem: Problem, op: str, rng: random.Random) -> dict[str, Any]:
    """The tensors of a call by name, some of them laid out in another way."""
    names = {"pyramid_weight": (), "pyramid_merge": ("weight",), "pyramid_delta": ("x",)}
    wanted = (*names.get(op, ("x", "weight", "bias")), "A", "B", "folded")
    arguments = {name: getattr(problem, name) for name in wanted}
    if op in _ROW_OPS:
        arguments |= {"groups": problem.groups, "active": problem.active}
    for name, tensor in arguments.items():
        if tensor is not None and name != "active" and (name != "folded" or problem.active is None):
            layout = rng.choice(_LAYOUTS) if rng.random() < 0.4 else _same
            arguments[name] = layout(tensor, rng)
    return arguments


def _call(module: Any, op: str, arguments: dict[str, Any], geometry: Any, **options: Any) -> Tensor:
    positional = {name: value for name, value in arguments.items() if name != "active"}
    if module is not reference and op in _ROW_OPS:
        options["active"] = arguments["active"]
    return getattr(module, op)(*positional.values(), geometry, **options)


def _exact(op: str, arguments: dict[str, Any], geometry: PyramidGeometry) -> Tensor:
    wide = {
        name: tensor.double() if isinstance(tensor, Tensor) and tensor.is_floating_point() else tensor
        for name, tensor in arguments.items()
    }
    if wide.get("groups") is not None:
        wide["groups"] = wide["groups"].long()
    if op == "pyramid_merge":
        weight = wide.pop("weight")
        return weight + reference.pyramid_weight(*wide.values(), geometry)
    return _call(reference, op, wide, geometry)


def try_rows(rng: random.Random) -> str:
    """One call of an op on rows or weights."""
    op = rng.choice((*_ROW_OPS, *_ROW_OPS, "pyramid_weight", "pyramid_merge"))
    case: Case = random_case(rng)
    dtype = rng.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64))
    adapter = torch.float64 if dtype == torch.float64 else torch.float32
    problem = partly_active(case, dtype, adapter) if rng.random() < 0.3 else case.tensors(dtype, adapter)
    geometry, arguments, options = case.geometry, _rows_of(problem, op, rng), {}
    fault = rng.choice(_FAULTS) if rng.random() < 0.6 else None
    if fault is not None:
        name = rng.choice([name for name, value in arguments.items() if value is not None])
        arguments[name] = fault(arguments[name], rng)
    elif rng.random() < 0.1:
        geometry = rng.choice((None, "geometry", (3, 4)))
    elif op in _ROW_OPS and rng.random() < 0.1:
        options["dropout_p"] = rng.choice((1, -0.1, float("nan"), "0.5", None, 2j))
    everything_meta = fault is None and isinstance(geometry, PyramidGeometry) and not options and rng.random() < 0.05
    if everything_meta:
        arguments = {name: value if value is None else value.to("meta") for name, value in arguments.items()}
    trains = op != "pyramid_merge" and fault is None and rng.random() < 0.5
    if trains:
        arguments = {
            name: value.requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in arguments.items()
        }
    try:
        result = _call(ept_kernels, op, arguments, geometry, **options)
    except Exception as error:
        return refusal(error, (*arguments, "geometry", *options))
    if everything_meta:
        if not result.is_meta:
            raise Wrong("meta tensors gave numbers")
        return "served"
    if any(isinstance(value, Tensor) and value.numel() > 10**6 for value in arguments.values()):
        return "served, not compared"  # the reference would build a weight for each of 2^40 groups
    exact = _exact(op, arguments, case.geometry)
    narrow = any(isinstance(value, Tensor) and value.dtype == torch.float32 for value in arguments.values())
    _check(op, result, exact, torch.float32 if narrow and result.dtype == torch.float64 else result.dtype)
    if trains:
        leaves = [value for value in arguments.values() if isinstance(value, Tensor) and value.requires_grad]
        cotangent = torch.randn(exact.shape)
        found = torch.autograd.grad(result, leaves, cotangent.to(result.dtype))
        wanted = torch.autograd.grad(exact, leaves, cotangent.to(result.dtype).double())
        for leaf, gradient, truth in zip(leaves, found, wanted, strict=True):
            inactive = leaf is arguments["folded"] and arguments.get("active") is not None
            if not inactive:
                _check(f"a gradient {list(leaf.shape)} of {op}", gradient, truth, result.dtype)
    return "served"


def try_fold(rng: random.Random) -> str:
    """One call of ``fold_tasks`` or ``fold_kept``."""
    geometry = random_case(rng).geometry
    tasks_there, width, count = rng.randint(1, 6), rng.choice((1, 3, 16, 17)), rng.choice((0, 1, 2, 7))
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    arguments: dict[str, Any] = {
        "gate": torch.randn(geometry.num_experts, width, generator=generator),
        "table": torch.randn(tasks_there, width, generator=generator),
        "tasks": rng.choice((None, rng.randrange(tasks_there), torch.randint(tasks_there, (count,)))),
        "kernels": [torch.randn(k, k, generator=generator) for k in geometry.kernel_sizes],
        "top_k": rng.randint(1, geometry.num_experts),
        "scaling": rng.choice((0.5, 4, 1e-3)),
    }
    fault = rng.random()
    name = rng.choice(tuple(arguments))
    if fault < 0.5 and name in ("gate", "table"):
        arguments[name] = rng.choice((*_FAULTS, *_LAYOUTS))(arguments[name], rng)
    elif fault < 0.5 and name == "kernels":
        place = rng.randrange(geometry.num_experts)
        arguments["kernels"][place] = rng.choice((*_FAULTS, *_LAYOUTS))(arguments["kernels"][place], rng)
    elif fault < 0.5:
        odd: tuple[Any, ...] = (-1, tasks_there, 10**30, 2.0, True, "a", [0], 2j)
        ids = (torch.tensor([0.5]), torch.tensor([True]), torch.tensor([-1]), torch.zeros(2, 2, dtype=torch.int64))
        odd += (*ids, torch.tensor([0], device="meta"), torch.tensor([2**62]))
        arguments[name] = rng.choice(odd if name == "tasks" else odd[:-6])
    function: Callable[..., Any] = ept_kernels.fold_tasks
    call = (*(arguments[key] for key in ("gate", "table", "tasks", "kernels", "top_k", "scaling")), geometry)
    kept = rng.random() < 0.4
    try:
        with torch.set_grad_enabled(not kept):
            if kept:
                function, holders = ept_kernels.fold_kept, (Kept(), Kept())
                result = function(*holders, *call)
                result = function(*holders, *call)  # from what is kept
            else:
                result = function(*call)
    except Exception as error:
        return refusal(error, (*arguments, "task_ids", "geometry"))
    if result is None:  # not these parameters: the caller composes, which other tests cover
        return "left to others"
    embeddings, tasks = arguments["table"].double(), arguments["tasks"]
    if isinstance(tasks, int):
        embeddings = embeddings[tasks : tasks + 1]
    elif tasks is not None and not kept:
        embeddings = embeddings[tasks.long().reshape(-1)]
    if kept and not isinstance(tasks, int) and (result[1] is None) != (tasks is None):
        raise Wrong("groups are missing")
    index, gates = route(arguments["gate"].double(), embeddings, arguments["top_k"])
    dense = torch.zeros(len(embeddings), geometry.num_experts, dtype=torch.float64).scatter(1, index, gates)
    kernels = [kernel.double() for kernel in arguments["kernels"]]
    exact = reference.fold_kernels(kernels, dense, arguments["scaling"], geometry)
    _check("a folded kernel", result[0], exact, torch.float32)
    return "served"


def main(first: int, count: int) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    outcomes: Counter[str] = Counter()
    wrong = []
    for seed in range(first, first + count):
        print(seed, flush=True)
        rng = random.Random(seed)
        torch.manual_seed(seed)
        try:
            outcomes[(try_fold if seed % 3 == 0 else try_rows)(rng)] += 1
        except Exception as error:
            wrong.append(f"seed {seed}: {type(error).__name__}: {error}")
    print(json.dumps({"outcomes": outcomes, "wrong": wrong}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
