"""Export of a run through the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tests.command_line import Outcome

from kronsae.interop import formats

if TYPE_CHECKING:
    from kronsae.runs.run import Run


def test_a_run_is_exported(finished_run: Run, kronsae: Callable[..., Outcome], tmp_path: Path) -> None:
    names = finished_run.names
    done = kronsae("export", finished_run.folder, names[0], "--to", "saelens", "--out", tmp_path / "one", "--json")
    assert done.status == 0, done.err
    assert json.loads(done.out) == {names[0]: str(tmp_path / "one")}
    assert "What now?" in done.err
    found = formats.read(tmp_path / "one")
    sae = finished_run.load(names[0])
    x = torch.randn(8, sae.d_in)
    assert torch.allclose(found.sae(x), sae(x), atol=1e-6)
    assert (found.model, found.hook_read) == (finished_run.config.model.name, "blocks.2.hook_resid_post")


def test_wrong_arguments_are_refused(finished_run: Run, kronsae: Callable[..., Outcome], tmp_path: Path) -> None:
    words = ("export", finished_run.folder)
    done = kronsae(*words, "--to", "saelnes", "--out", tmp_path / "out")
    assert (done.status, "Did you mean 'saelens'?" in done.err) == (2, True)
    done = kronsae(*words, "nothing", "--to", "saelens", "--out", tmp_path / "out")
    assert (done.status, "name must be one of the SAEs" in done.err) == (2, True)
    (tmp_path / "file").touch()
    done = kronsae(*words, "--to", "saelens", "--out", tmp_path)
    assert (done.status, "out must be a new or empty folder" in done.err) == (2, True)
    assert not (tmp_path / "out").exists()
