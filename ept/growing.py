"""Parameters that grow by rows while the rows that there were stay as they are, to the bit.

An optimizer moves a tensor as a whole: weight decay and momentum change even rows without a gradient. So the finished
rows and the new ones are two parameters, ``name`` and ``name_added``; whoever reads ``module.name`` gets both in one
tensor, and a state dict holds them as one, under ``name``: a checkpoint does not show how it came about.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


def _stored(module: nn.Module, name: str) -> Tensor | None:
    """A parameter of ``module``, or the plain tensor that FSDP puts in its place during a pass."""
    parameter = module._parameters.get(name)
    return module.__dict__.get(name) if parameter is None else parameter


def growing(name: str) -> property:
    """What a class has under the name of a parameter that may grow; set and deleted as any parameter."""

    def rows(module: nn.Module) -> Tensor:
        kept, added = _stored(module, name), _stored(module, f"{name}_added")
        if kept is None:
            raise AttributeError(name)
        return kept if added is None else torch.cat([kept, added])

    def store(module: nn.Module, value: Tensor) -> None:
        module.__dict__[name] = value

    def remove(module: nn.Module) -> None:
        del module.__dict__[name]

    return property(rows, store, remove, f"All rows of ``{name}``; a parameter only while none have been added.")


class GrowingModule(nn.Module):
    """A module with parameters declared by ``growing``; a subclass names them in ``grows``."""

    grows: ClassVar[tuple[str, ...]] = ()

    def row_parameters(self, name: str) -> list[nn.Parameter]:
        """The parameters that hold the rows of ``name``: one, or the finished one and the added one."""
        parts = (self._parameters[name], self._parameters.get(f"{name}_added"))
        return [part for part in parts if part is not None]

    @torch.no_grad()
    def split_rows(self, name: str, finished: int) -> None:
        """Freeze the first ``finished`` rows of ``name``; the others, if any, are ``name_added``."""
        rows = getattr(self, name).detach()
        self._parameters[name] = nn.Parameter(rows[:finished].clone(), requires_grad=False)
        added = nn.Parameter(rows[finished:].clone()) if len(rows) > finished else None
        self.register_parameter(f"{name}_added", added)

    @torch.no_grad()
    def append_rows(self, name: str, rows: Tensor) -> None:
        """Freeze all rows of ``name`` that there are and add trainable ones."""
        before = getattr(self, name).detach()
        self.register_parameter(f"{name}_added", None)  # rows added earlier are in ``before``
        self._parameters[name] = nn.Parameter(torch.cat([before, rows.to(before)]), requires_grad=False)
        self.split_rows(name, len(before))

    @torch.no_grad()
    def fill_rows(self, name: str, rows: Tensor) -> None:
        """Set every row of ``name``."""
        parts = self.row_parameters(name)
        for part, own in zip(parts, rows.split([len(part) for part in parts]), strict=True):
            part.copy_(own)

    def requires_grad_(self, requires_grad: bool = True) -> GrowingModule:
        """As in ``nn.Module``, but finished rows never require a gradient."""
        super().requires_grad_(requires_grad)
        self.freeze_finished_rows()
        return self

    def freeze_finished_rows(self) -> None:
        """Rows that others have been added to do not train."""
        for name in self.grows:
            finished, added = self._parameters.get(name), self._parameters.get(f"{name}_added")
            if finished is not None and added is not None:
                finished.requires_grad_(False)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.grows:
            added = destination.pop(f"{prefix}{name}_added", None)
            if added is not None:
                destination[f"{prefix}{name}"] = torch.cat([destination[f"{prefix}{name}"], added])

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in self.grows:
            parts, rows = self.row_parameters(name), state_dict.get(f"{prefix}{name}")
            if len(parts) > 1 and rows is not None and len(rows) == sum(map(len, parts)):
                state_dict = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
                finished, added = rows.split([len(part) for part in parts])
                state_dict |= {f"{prefix}{name}": finished, f"{prefix}{name}_added": added}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
