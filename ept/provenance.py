"""Which samples the entries of a tensor come from, found out while a model that nobody knows runs a mixed batch.

In transformers' models the code around a layer says which dimension of its input is the batch. In others a first
dimension that is as long as the ids may be anything: the time, the choice of an expert, tokens that were selected, the
tokens of one sample in a loop. Until a layer's place is known, the operations between the call's inputs and the layer
are watched, and those that move entries are repeated on a companion that holds the sample of each.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

#: In place of a sample: an entry that comes from none, such as a learned token, and one that comes from several.
NONE, SEVERAL = -1, -2

#: Functions whose result may have the shape of an operand, but is made of the first one's rows alone.
_CONTRACT = {"linear", "matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm", "scaled_dot_product_attention"}

#: Functions that may go over the samples, by their argument ``dim``.
_REDUCE = {
    *("mean", "sum", "max", "min", "amax", "amin", "argmax", "argmin", "std", "var", "norm", "prod", "logsumexp"),
    *("median", "any", "all", "cumsum", "cumprod", "softmax"),
}

#: Functions that choose entries by values, of which the next batch may have others.
_CHOOSE = {"__getitem__", "index_select", "gather", "take_along_dim", "masked_select"}

#: Functions that move entries: done to the companion as well.
_MOVE: set[str] = {
    *_CHOOSE,
    *("view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze", "expand"),
    *("expand_as", "broadcast_to", "repeat", "repeat_interleave", "tile", "transpose", "swapaxes", "swapdims"),
    *("permute", "t", "movedim", "moveaxis", "split", "chunk", "tensor_split", "unbind", "narrow", "select", "cat"),
    *("concat", "stack", "hstack", "vstack", "flip", "roll", "rot90", "unfold", "diagonal", "contiguous", "detach"),
    "clone",
}

#: Properties that do so.
_PROPERTIES = frozenset(getattr(Tensor, name).__get__ for name in ("T", "mT", "data"))

#: How functions begin that put entries anywhere.
_SCATTER = ("index_", "scatter", "masked_scatter", "put", "sort", "argsort", "topk", "tensordot", "setitem")


class _Eager:
    """Has ``torch.compile`` run what it would compile as it is written, while any thread follows samples."""

    def __init__(self) -> None:
        self._lock, self._users = threading.Lock(), 0
        self._stance: Any = None

    def begin(self) -> bool:
        with self._lock:
            if not self._users:
                try:
                    self._stance = torch.compiler.set_stance("force_eager")
                except RuntimeError:  # inside of something that is compiled
                    return False
            self._users += 1
        return True

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._stance.__exit__(None, None, None)


_eager = _Eager()


class SampleTracker(TorchFunctionMode):
    """Follows the samples of a call's inputs from ``begin`` to ``leave``; what is compiled runs eagerly meanwhile.

    Args:
        count: of samples.
        inputs: of the call; those that are as long as the samples hold these.
    """

    def __init__(self, count: int, inputs: Iterable[Any]) -> None:
        super().__init__()
        self.count = count
        self._handles: list[RemovableHandle] = []
        self._followed: Any = WeakTensorKeyDictionary()  # of (companion in the tensor's shape, whether it is always so)
        for x in inputs:
            if isinstance(x, Tensor):
                self.root(x)

    def root(self, x: Tensor) -> None:
        """Take the first dimension of x for the samples, if it is as long."""
        if x.dim() and x.shape[0] == self.count:
            places = torch.arange(self.count, dtype=torch.int16, device=x.device)
            self._followed[x] = places.view(-1, *(1 for _ in x.shape[1:])).expand(x.shape), True

    def begin(self, layers: Mapping[nn.Module, bool]) -> bool:
        """Start following, if this is not a part of something that is compiled; says whether it did.

        Args:
            layers: of which a row of the output is made of that of the input, each with whether the first dimension is
                the batch wherever it is as long.
        """
        if not _eager.begin():
            return False
        for layer, known in layers.items():
            self._handles.append(layer.register_forward_hook(partial(self._pass, known)))
        self.__enter__()
        return True

    def _pass(self, known: bool, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook: go on at the output of a layer."""
        if _get_current_function_mode() is not self or not args or not isinstance(output, Tensor):
            return  # another thread runs the same layer
        if args[0] in self._followed:
            companion, always = self._followed[args[0]]
            if companion.shape[:-1] == output.shape[:-1]:
                self._followed[output] = companion[..., :1].expand(output.shape), always
        elif known:
            self.root(output)

    def leave(self) -> None:
        """Stop following."""
        for handle in self._handles:
            handle.remove()
        _eager.leave()
        if _get_current_function_mode() is self:
            self.__exit__(None, None, None)

    def samples_at(self, x: Tensor, dim: int) -> tuple[bool, bool] | None:
        """Whether dimension ``dim`` of x holds the samples, and whether it always will; None where nobody knows."""
        found = self._followed.get(x)
        if found is None or found[0].is_meta:
            return None
        companion, always = found  # on another device than x, perhaps: what moves x leaves it where it is
        if companion.shape[dim] != self.count:
            return False, always
        own = torch.arange(self.count, device=companion.device).view(
            *(self.count if i == dim else 1 for i in range(x.dim()))
        )
        small = _essence(companion)
        return bool(((small == own) | (small == NONE)).all()), always

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is Tensor.__iter__:
            result = list(result)
            self._follow(torch.unbind, args, kwargs, result)
            return iter(result)
        if isinstance(result, (Tensor, tuple, list)) and not isinstance(result, torch.Size):
            self._follow(func, args, kwargs, result)
        return result

    def _follow(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        given = [x for x in _flat((*args, *kwargs.values())) if isinstance(x, Tensor)]
        found = [(x, *self._followed[x]) for x in given if x in self._followed]
        name = getattr(func, "__name__", "")
        made = [x for x in _flat((result,)) if isinstance(x, Tensor)]
        try:
            companions = self._companions(func, name, args, kwargs, found, made)
        except (RuntimeError, IndexError, TypeError, ValueError):  # a move that a companion does not go along with
            companions = [None] * len(made)
        always = all(sure for _, _, sure in found) and not (name in _CHOOSE and len(given) > 1)
        for x, companion in zip(made, companions, strict=False):
            if companion is not None and companion.shape == x.shape and companion.dtype == torch.int16:
                self._followed[x] = companion, always
            elif x in self._followed:  # changed in place, and handed back
                del self._followed[x]

    def _companions(
        self, func: Any, name: str, args: Any, kwargs: dict[str, Any], found: list[Any], made: list[Tensor]
    ) -> list[Tensor | None]:
        first = args[0] if args else None
        if not found:
            return [None] * len(made)
        if name in _MOVE or func in _PROPERTIES:
            if isinstance(first, Tensor) and first not in self._followed:  # chosen by something that is followed
                masks = any(x.dtype == torch.bool for x, *_ in found)
                return [torch.full_like(x, SEVERAL, dtype=torch.int16) if masks else None for x in made]
            moved = func(self._stand_in(first), *args[1:], **{key: self._stand_in(x) for key, x in kwargs.items()})
            return [x for x in _flat((moved,)) if isinstance(x, Tensor)]
        if name.strip("_").startswith(_SCATTER):
            return [None] * len(made)
        return [self._computed(name, args, kwargs, found, x) for x in made]

    def _stand_in(self, value: Any) -> Any:
        """The companion of a tensor, or of several; the index of a selection stays as it is."""
        if isinstance(value, (tuple, list)) and all(isinstance(x, Tensor) for x in value):
            return [self._companion(x) for x in value]
        return self._followed[value][0] if isinstance(value, Tensor) and value in self._followed else value

    def _companion(self, x: Tensor) -> Tensor:
        return self._followed[x][0] if x in self._followed else x.new_full((), NONE, dtype=torch.int16).expand(x.shape)

    def _computed(self, name: str, args: Any, kwargs: dict[str, Any], found: list[Any], made: Tensor) -> Tensor | None:
        """The companion of what is computed of entries that have the same place; None where nobody knows."""
        small = [_essence(companion) for _, companion, _ in found]
        if all(one.numel() == 1 for one in small):  # of one sample, whatever is done
            values = torch.stack([one.reshape(()) for one in small])
            return torch.where((values == values[0]).all(), values[0], SEVERAL).to(torch.int16).expand(made.shape)
        if name == "einsum":
            return self._summed(args, found, made)
        if _reduces_first(name, args, kwargs):
            return None
        shaped = [companion for x, companion, _ in found if x.shape == made.shape]
        if shaped:
            every = [companion for _, companion, _ in found]
            return _together(every, made.shape) if name not in _CONTRACT else shaped[0]
        x, companion, _ = found[0]
        if x.dim() and x is (args[0] if args else x):
            if x.shape[:-1] == made.shape[:-1]:
                return companion[..., :1].expand(made.shape)
            if x.shape == made.shape[:-1]:
                return companion.unsqueeze(-1).expand(made.shape)
        if all(one.dim() and one.numel() == one.shape[0] == made.shape[0] for one in small) and made.dim():
            rows = [one.reshape(-1) for one in small]
            if all(torch.equal(row, rows[0]) for row in rows):
                return rows[0].view(-1, *(1 for _ in made.shape[1:])).expand(made.shape)
        return None

    def _summed(self, args: Any, found: list[Any], made: Tensor) -> Tensor | None:
        """As ``_computed``, of ``einsum``: the letter that the samples have tells where they go."""
        if not isinstance(args[0], str) or "->" not in args[0] or "." in args[0]:
            return None
        sources, target = args[0].replace(" ", "").split("->")
        operands = dict(zip(map(id, _flat(args[1:])), sources.split(","), strict=False))
        letters, rows = set(), None
        for x, companion, _ in found:
            long = [dim for dim, size in enumerate(_essence(companion).shape) if size > 1]
            if len(long) != 1 or id(x) not in operands:
                return None
            letters.add(operands[id(x)][long[0]])
            rows = _essence(companion).reshape(-1)
        (letter, *others) = letters
        if others or letter not in target or rows is None:
            return made.new_full((), SEVERAL, dtype=torch.int16).expand(made.shape)
        place = target.index(letter)
        return rows.view(*(-1 if dim == place else 1 for dim in range(made.dim()))).expand(made.shape)


def _flat(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _flat(value)
        else:
            yield value


def _essence(companion: Tensor) -> Tensor:
    """The companion without its repetitions: dimensions along which it was expanded have the length 1."""
    repeated = zip(companion.stride(), companion.shape, strict=True)
    return companion[tuple(slice(0, 1) if step == 0 and size else slice(None) for step, size in repeated)]


def _together(companions: list[Tensor], shape: torch.Size) -> Tensor | None:
    """The companion of what is computed of entries of several tensors, broadcast: where samples meet, of several."""
    result = None
    for companion in companions:
        small = _essence(companion)
        if result is None:
            result = small
            continue
        differ = (result != small) & (result != NONE) & (small != NONE)
        result = torch.where(differ, SEVERAL, torch.where(result == NONE, small, result)).to(torch.int16)
    return None if result is None else result.expand(shape)


def _reduces_first(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a reduction takes the first dimension, as far as its arguments tell."""
    if name.strip("_") not in _REDUCE:
        return False
    dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
    dims = dims if isinstance(dims, (tuple, list)) else (dims,)
    size = args[0].dim() if args and isinstance(args[0], Tensor) else 0
    return any(not isinstance(dim, int) or dim in (0, -size) for dim in dims)
