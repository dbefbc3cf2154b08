"""What an adapted layer cannot be transformed by, refused by name rather than deep inside an op."""

from __future__ import annotations

import torch


def check_transforms(layer: str) -> None:
    """Refuse what the ops of an adapter that is not merged do not serve.

    ``vmap`` over samples of one task works, and so does ``torch.export``.

    Raises:
        RuntimeError: derivatives by ``torch.func``, or an export to ONNX.
    """
    functorch = torch._C._functorch
    transformed = not torch.compiler.is_compiling() and functorch.peek_interpreter_stack() is not None
    if transformed and any(level.key() != functorch.TransformType.Vmap for level in functorch.get_interpreter_stack()):
        raise RuntimeError(
            f"{layer} is differentiated by torch.func, which does not reach into the adapter's ops: use backward() or "
            "torch.autograd.grad, one sample at a time for per-sample gradients, or merge first"
        )
    if not torch.compiler.is_dynamo_compiling() and torch.onnx.is_in_onnx_export():
        raise RuntimeError(f"{layer} cannot be written as ONNX with its adapter: merge first (merge, merge_and_unload)")
