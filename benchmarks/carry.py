"""Fill one folder with what a bare GPU machine lacks: PEFT and what it needs, and the commit that is measured.

    python benchmarks/carry.py            # writes carry/, which git ignores and benchmarks/gpu.py puts on its path

Pure wheels alone, so that the folder serves any platform and Python. torch, Triton, transformers, accelerate and numpy
are expected there.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "speed"))

from harness import COMMIT_FILE, commit

PACKAGES = ("peft>=0.21,<0.22", "rich>=13.7", "markdown-it-py", "mdurl", "pygments")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(arguments)
    folder, found = COMMIT_FILE.parent, commit()
    shutil.rmtree(folder, ignore_errors=True)
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--platform=any", "--no-compile", "--target", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, *PACKAGES], check=True)
    COMMIT_FILE.write_text(found + "\n")
    files = [path for path in folder.rglob("*") if path.is_file()]
    print(f"{folder}: {len(files)} files, {sum(path.stat().st_size for path in files) / 2**20:.1f} MiB, commit {found}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
