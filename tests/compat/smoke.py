"""What an installed package must do, in one process and without pytest: import, train, adapt, save, load, inspect.

``python smoke.py [--without-native]``; an ``AssertionError`` or any other says what failed. Run it outside the
repository, so that the installed package is the one imported.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib import metadata, resources
from pathlib import Path

import torch


def check_import() -> None:
    """Importing starts no CUDA and brings no extra, whatever PEFT and transformers themselves bring."""
    import peft  # noqa: F401

    before = set(sys.modules)
    import ept
    import ept_kernels

    assert not torch.cuda.is_initialized(), "importing ept initialised CUDA"
    assert ept.__version__ == metadata.version("ept-kernels")
    extras = {"datasets", "matplotlib", "rich", "sklearn", "triton"} & (set(sys.modules) - before)
    assert not extras, f"importing ept pulled in {sorted(extras)}"
    print("installed at", Path(ept.__file__).parent)
    print("backends for the CPU:", ", ".join(ept_kernels.available_backends(torch.device("cpu"))))


def check_layer() -> None:
    """Forward and backward of a batch that mixes tasks, and the same output merged."""
    from ept import EPTConfig, EPTLinear

    torch.manual_seed(0)
    layer = EPTLinear.from_linear(torch.nn.Linear(33, 47), EPTConfig(r=4, num_tasks=3))
    for parameter in layer.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)  # a fresh adapter changes nothing
    x = torch.randn(6, 5, 33, requires_grad=True)
    y = layer(x, torch.tensor([0, 1, 2, 2, 1, 0]))
    y.square().mean().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert any(p.grad is not None and p.grad.any() for p in layer.parameters())
    layer.merge(task=2)
    torch.testing.assert_close(layer(x[2]), y[2], rtol=1e-4, atol=1e-5)


def check_tuner(folder: Path) -> None:
    """An adapter on a model of transformers is saved, loaded to the same outputs, merged and inspected."""
    from peft import PeftModel, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    import ept

    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    config = ept.EPTConfig(
        r=4, task_type="CAUSAL_LM", task_names=["one", "two"], target_modules=["q_proj", "down_proj"]
    )
    model = get_peft_model(base, config)
    tokens = torch.randint(50, (4, 7))
    optimizer = torch.optim.AdamW(ept.parameter_groups(model, lr=1e-2))
    losses = []
    for _ in range(5):
        loss = model(input_ids=tokens, labels=tokens, task_ids=["one", "two", "two", "one"]).loss
        (loss + config.contrastive_weight * ept.contrastive_loss(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0], f"five steps did not lower the loss: {losses}"
    model.eval()
    with torch.no_grad():
        trained = model(input_ids=tokens, task_ids=[1, 0, 1, 0]).logits
    model.save_pretrained(folder)

    again = LlamaForCausalLM(base.config)
    again.load_state_dict(state)
    loaded = PeftModel.from_pretrained(again, folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=tokens, task_ids=[1, 0, 1, 0]).logits, trained, rtol=0, atol=0)
        merged = loaded.merge_and_unload(task="two")
        torch.testing.assert_close(merged(input_ids=tokens).logits[::2], trained[::2], rtol=1e-4, atol=1e-5)


def check_inspect(folder: Path) -> None:
    """The installed command reads the adapter and writes its page, whose style and script came with the package."""
    command = Path(sys.executable).with_name("ept-inspect")
    page = folder / "page.html"
    done = subprocess.run([command, folder, "--html", page], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (resources.files("ept.inspecting") / "page.css").read_text()[:40] in page.read_text()


def main() -> None:
    check_import()
    if "--without-native" in sys.argv[1:]:
        import ept_kernels

        found = ept_kernels.available_backends(torch.device("cpu"))
        assert "cpu" not in found and "triton" not in found, (
            f"expected neither compiled kernels nor Triton, got {found}"
        )
    check_layer()
    with tempfile.TemporaryDirectory() as folder:
        check_tuner(Path(folder))
        check_inspect(Path(folder))
    print("smoke test passed")


if __name__ == "__main__":
    main()
