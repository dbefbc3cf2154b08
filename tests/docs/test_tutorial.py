"""docs/tutorial.md, every block as it stands, in order, in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial.md"

#: The last block is for a machine without this package.
WITHOUT = "import sys\nsys.modules['ept'] = sys.modules['ept_kernels'] = None\n"


def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    blocks = re.findall(r"```(bash|python)\n(.*?)```", TUTORIAL.read_text(), flags=re.DOTALL)
    assert [language for language, _ in blocks] == ["bash"] * 3 + ["python"] * 4
    *blocks, (_, plain) = blocks
    script = "\n".join(code for language, code in blocks if language == "python")
    commands = [["bash", "-euo", "pipefail", "-c", code] for language, code in blocks if language == "bash"]
    for command in (*commands, [sys.executable, "-c", script], [sys.executable, "-c", WITHOUT + plain]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "movies" in (tmp_path / "runs/tutorial/adapter.html").read_text()
    assert (tmp_path / "runs/four/adapter/adapter_model.safetensors").is_file()
