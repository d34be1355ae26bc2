"""Export of a run through the command line."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors import SafetensorError
from tests.command_line import Outcome

from kronsae.interop import formats, saelens_export
from kronsae.support.files import write_json

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


def test_a_name_that_is_given_twice_is_one_sae(
    finished_run: Run, kronsae: Callable[..., Outcome], tmp_path: Path
) -> None:
    for to, out in (("saelens", tmp_path / "lens"), ("delphi", tmp_path / "delphi")):
        done = kronsae("export", finished_run.folder, "topk", "topk", "--to", to, "--out", out, "--json")
        assert done.status == 0, done.err
        assert list(done.json) == ["topk"]
    assert (tmp_path / "lens" / "cfg.json").exists()


@pytest.mark.parametrize("existed", [False, True])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left on device")]
)
def test_a_full_disk_leaves_nothing(
    existed: bool,
    error: Exception,
    finished_run: Run,
    kronsae: Callable[..., Outcome],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second of two SAEs does not fit."""
    out = tmp_path / "out"

    def full(path: Path, value: object) -> None:
        if path.parent.name == "kron":
            assert (out / "topk" / "cfg.json").exists()
            raise error
        write_json(path, value)

    monkeypatch.setattr(saelens_export, "write_json", full)
    if existed:
        out.mkdir()
    sentence = kronsae("export", finished_run.folder, "topk", "kron", "--to", "saelens", "--out", out).sentence
    assert sentence.startswith(f"'{out}' must be writable; got ")
    assert "No space left on device" in sentence
    assert list(tmp_path.iterdir()) == [out] * existed
    assert not existed or list(out.iterdir()) == []
