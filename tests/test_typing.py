"""The types that ship are those that users need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_typed_uses_of_the_public_api(tmp_path: Path) -> None:
    program = Path(__file__).parent / "typed_uses.py"
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path), str(program)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=program.parent.parent,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
