"""Loading of SAEs from run folders, SAE folders and the Hub, and its errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from tests.tiny_models import WIDTH

import kronsae as ks
from kronsae.core.sae import SAE
from kronsae.runs.run import Run
from kronsae.support.errors import UserError


def same(one: SAE, other: SAE) -> bool:
    """Return whether the weights, and therefore the outputs, are equal."""
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == other_name and torch.equal(value, mine) for (name, value), (other_name, mine) in pairs)


def test_from_a_run(finished_run: Run) -> None:
    for name in ("topk", "kron"):
        sae = ks.load(finished_run.folder, name)
        assert same(sae, finished_run.load(name))
        assert same(sae, ks.load(str(finished_run.folder), name))
    assert ks.load(finished_run.folder, "kron").config.architecture == "kronecker-topk"
    assert ks.load(finished_run.folder, "topk").d_in == WIDTH


def test_from_a_folder_of_its_own(finished_run: Run) -> None:
    folder = finished_run.folder / "saes" / "kron"
    assert same(ks.load(folder), finished_run.load("kron"))
    assert same(ks.load(folder, "kron"), finished_run.load("kron"))
    with pytest.raises(UserError) as caught:
        ks.load(folder, "topk")
    assert str(caught.value) == f"name must be left out for {folder}, the folder of a single SAE; got 'topk'."


def test_what_was_saved_alone(tmp_path: Path) -> None:
    sae = ks.kron(num_heads=2, d_base=2, d_extension=2, k=2).shape(4).build(seed=3)
    ks.save(sae, tmp_path / "mine")
    assert same(ks.load(tmp_path / "mine"), sae)


def test_the_name_may_be_left_out_where_there_is_one(finished_run: Run, tmp_path: Path) -> None:
    shutil.copytree(finished_run.folder / "saes" / "kron", tmp_path / "saes" / "kron")
    assert same(ks.load(tmp_path), finished_run.load("kron"))


@pytest.mark.parametrize(
    ("name", "got"), [(None, "None."), ("korn", "'korn'. Did you mean 'kron'?"), ("../kron", "'../kron'. Did you mean")]
)
def test_a_name_that_is_none(name: str | None, got: str, finished_run: Run) -> None:
    with pytest.raises(UserError) as caught:
        ks.load(finished_run.folder, name)
    assert str(caught.value).startswith(f"name must be one of kron, topk for {finished_run.folder}; got {got}")


def test_a_folder_without_an_sae(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        ks.load(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} must hold an SAE; it has neither cfg.json nor a finished run's saes/ folder."
    )


@pytest.mark.parametrize("source", ["/no/such/run", "./run", "run", "a/b/c", "~/run"])
def test_no_folder(source: str) -> None:
    with pytest.raises(UserError) as caught:
        ks.load(source)
    assert str(caught.value) == (
        f"the source must be a folder or a Hub name (user/repo); got {source}. Check the path."
    )


def test_a_damaged_sae(finished_run: Run, tmp_path: Path) -> None:
    shutil.copytree(finished_run.folder / "saes", tmp_path / "saes")
    (tmp_path / "saes" / "kron" / "sae_weights.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match=r"is damaged: .*\. Save or download it again\.$"):
        ks.load(tmp_path, "kron")
    config = tmp_path / "saes" / "topk" / "cfg.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"format": 99}))
    with pytest.raises(UserError, match=r"has format 99; this version reads format 1\."):
        ks.load(tmp_path, "topk")


class TestHub:
    def test_both_layouts(self, finished_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[tuple[str, Any]] = []
        layouts = {"user/run": finished_run.folder, "user/one": finished_run.folder / "saes" / "topk"}

        def download(repository: str, allow_patterns: Any) -> str:
            asked.append((repository, allow_patterns))
            return str(layouts[repository])

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        assert same(ks.load("user/run", "kron"), finished_run.load("kron"))
        assert same(ks.load("user/one"), finished_run.load("topk"))
        assert asked == [(name, ["*.json", "*.safetensors"]) for name in ("user/run", "user/one")]

    def test_a_local_folder_comes_first(
        self, finished_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shutil.copytree(finished_run.folder, tmp_path / "runs" / "whole")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
        assert same(ks.load("runs/whole", "kron"), finished_run.load("kron"))

    def test_no_network(self) -> None:
        with pytest.raises(UserError) as caught:
            ks.load("user/repo")
        assert str(caught.value) == (
            "'user/repo' must be a local folder or a Hub repository; there is no such folder, and the download failed "
            "(LocalEntryNotFoundError). Check the name, the network and your access."
        )
        assert isinstance(caught.value.__context__, LocalEntryNotFoundError)

    def test_a_name_that_the_hub_cannot_have(self) -> None:
        with pytest.raises(
            UserError, match=r"^'us er/repo' must be a local folder or a Hub repository; .*HFValidationError"
        ):
            ks.load("us er/repo")
