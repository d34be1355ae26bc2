"""``import kronsae`` prints nothing and imports no optional or heavy package; functions import them when needed."""

from __future__ import annotations

import json
import subprocess
import sys

HEAVY = {
    "datasets",
    "huggingface_hub",
    "jinja2",
    "numba",
    "openai",
    "pandas",
    "plotly",
    "pyarrow",
    "rich",
    "scipy",
    "sklearn",
    "tenacity",
    "tensorboard",
    "transformers",
    "triton",
    "typer",
    "wandb",
}

# Relative to torch, which may itself load something (a CUDA build's triton), and which sets the scale of the time.
SCRIPT = """
import json, sys, time
start = time.perf_counter()
import torch
torch_seconds = time.perf_counter() - start
loaded = set(sys.modules)
start = time.perf_counter()
import kronsae
seconds = time.perf_counter() - start
new = sorted({name.split(".")[0] for name in set(sys.modules) - loaded})
print(json.dumps({"new": new, "torch_seconds": torch_seconds, "seconds": seconds}))
"""


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=200, check=False)


def test_import_loads_nothing_heavy_and_takes_no_time() -> None:
    done = _python("-c", SCRIPT)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result["new"]) & HEAVY == set()
    # 0.02 s against torch's 1.2 s when measured; the bound is loose for the sake of a busy machine.
    assert result["seconds"] < 0.5 * result["torch_seconds"] + 1.0


def test_import_writes_nothing_even_where_warnings_are_errors() -> None:
    done = _python("-W", "error", "-c", "import kronsae")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
