"""sae-lens reads what we write."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import sae_lens
from tests.interop.test_saelens_export import SPECS, exportable
from tests.interop_real.saelens.lens import TOLERANCE, difference, inputs

import kronsae.interop.saelens  # noqa: F401 (registers our architectures)
from kronsae.interop import saelens_export

OURS = {spec for spec, architecture in SPECS.items() if architecture.startswith("kronsae")}


@pytest.mark.parametrize("spec", SPECS)
def test_sae_lens_loads_an_export(spec: str, tmp_path: Path, record: Callable[..., None]) -> None:
    one = exportable(spec)
    saelens_export.export((one,), tmp_path / "out")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "out")
    assert type(theirs).__module__.startswith("sae_lens.") == (spec not in OURS)
    assert (theirs.cfg.metadata.model_name, theirs.cfg.metadata.context_size) == (one.model, 128)
    assert theirs.cfg.metadata.hook_name.startswith("blocks.3.")
    largest = difference(one.sae, theirs, inputs())
    assert largest <= TOLERANCE
    record(
        f"`{spec}` opened with SAE.load_from_disk",
        format=f"SAELens {SPECS[spec]}",
        direction="write",
        package="sae-lens",
        difference=largest,
        tolerance=TOLERANCE,
    )


@pytest.mark.timeout(1200)  # a process that imports sae-lens
def test_architectures_of_sae_lens_need_no_import_of_ours(tmp_path: Path) -> None:
    spec = "batch_topk d_sae=48 k=5"
    saelens_export.export((exportable(spec),), tmp_path / "out")
    code = (
        "import sys, sae_lens; sae = sae_lens.SAE.load_from_disk(sys.argv[1]); "
        "assert 'kronsae' not in sys.modules; print(type(sae).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "JumpReLUSAE"), done.stderr
