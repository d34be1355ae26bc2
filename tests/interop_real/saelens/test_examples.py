"""The example that trains a KronSAE and opens it in SAELens, with SAELens; `make test` runs it without."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "open_in_sae_lens.py"


@pytest.mark.timeout(1200)  # a process that imports sae-lens
def test_the_example_opens_its_sae_in_sae_lens(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(EXAMPLE)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "SAELens opened KronTopKSAE, blocks.3.hook_resid_post" in done.stdout
    difference = re.search(r"largest difference of a latent: (\S+)", done.stdout)
    assert difference is not None
    assert float(difference[1]) <= 1e-5
