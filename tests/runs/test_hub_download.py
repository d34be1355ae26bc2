"""Loading from the Hub, by the real client of ``huggingface_hub``, from a stand-in of its interface."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from tests.hub_stand_in import TOKEN, Hub
from tests.interop.foreign_saes import sparsify

import kronsae as ks
from kronsae.core.sae import SAE
from kronsae.runs.hub_download import download
from kronsae.runs.run import Run
from kronsae.support.errors import UserError

NAME = "user/repo"


def files_of(folder: Path, under: str = "") -> dict[str, bytes]:
    """Return the files of a folder, with their paths in a repository."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {f"{under}{name}": path.read_bytes() for name, path in found.items()}


@pytest.fixture
def saes(finished_run: Run) -> dict[str, bytes]:
    """The files of a pushed run: two SAEs and a card."""
    return files_of(finished_run.folder / "saes", "saes/") | {"README.md": b"# card"}


def same(one: SAE, other: SAE) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == other_name and torch.equal(value, mine) for (name, value), (other_name, mine) in pairs)


def written(tmp_path: Path) -> list[str]:
    """Return the files outside the Hub's cache, and the weights in it."""
    found = [path for path in tmp_path.rglob("*") if path.is_file()]
    outside = [path for path in found if not path.is_relative_to(tmp_path / "home" / "hub")]
    return [str(path) for path in (*outside, *tmp_path.rglob("*.safetensors"))]


def refusal(name: str | None = "kron", **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        ks.load(NAME, name, **options)
    return str(caught.value)


def test_only_the_files_of_one_sae_are_fetched(
    hub: Hub, saes: dict[str, bytes], finished_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = hub.add(NAME, saes | {"saes/kron/ae.pt": b"pickle", "saes/kron/code.py": b"print()"})
    assert same(ks.load(NAME, "kron"), finished_run.load("kron"))
    assert hub.fetched() == ["saes/kron/cfg.json", "saes/kron/sae_weights.safetensors"]
    said = capsys.readouterr().err
    assert f"{NAME} at commit {commit}: saes/kron/cfg.json, saes/kron/sae_weights.safetensors; " in said
    hub.asked.clear()
    assert same(ks.load(NAME, "saes/kron"), finished_run.load("kron"))
    assert hub.fetched() == []
    assert not any("topk" in line for line in hub.asked)


def test_one_sae_at_the_root(hub: Hub, finished_run: Run) -> None:
    hub.add(NAME, files_of(finished_run.folder / "saes" / "topk"))
    assert same(ks.load(NAME), finished_run.load("topk"))


def test_the_only_sae_of_a_run_needs_no_name(hub: Hub, finished_run: Run) -> None:
    """Folders for other libraries beside it are not chosen unless they are named."""
    kron = finished_run.folder / "saes" / "kron"
    topk = finished_run.folder / "saes" / "topk"
    hub.add(NAME, files_of(kron, "saes/kron/") | files_of(topk, "saelens/topk/"))
    assert same(ks.load(NAME), finished_run.load("kron"))
    assert same(ks.load(NAME, "saelens/topk"), finished_run.load("topk"))


def test_a_revision_is_pinned_to_a_commit(hub: Hub, saes: dict[str, bytes], finished_run: Run) -> None:
    first = hub.add(NAME, saes)
    topk = {name.replace("topk", "kron"): content for name, content in saes.items() if "topk" in name}
    second = hub.add(NAME, topk)
    hub.repositories[NAME].branches["v1"] = first
    for revision, commit, trained in (("v1", first, "kron"), (first, first, "kron"), (None, second, "topk")):
        assert same(ks.load(NAME, "kron", revision=revision), finished_run.load(trained))
        found = download(NAME, "kron", revision)
        assert (found.commit, found.path) == (commit, "saes/kron")
    assert refusal(revision="v2") == (
        "source: the Hugging Face Hub has no such revision of 'user/repo'. Check revision."
    )
    for wrong in ("../main", "a b", "", "/x", "x/"):
        assert refusal(revision=wrong) == (
            f"revision must be a branch, a tag or a commit; got {wrong!r}. Check revision."
        )


@pytest.mark.parametrize("how", ["offline", "no network", "broken"])
def test_what_the_cache_has_needs_no_network(
    how: str,
    hub: Hub,
    saes: dict[str, bytes],
    finished_run: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    commit = hub.add(NAME, saes)
    ks.load(NAME, "kron")
    unreachable(how, hub, monkeypatch)
    capsys.readouterr()
    assert same(ks.load(NAME, "kron"), finished_run.load("kron"))
    assert same(ks.load(NAME), finished_run.load("kron"))
    assert same(ks.load(NAME, revision=commit), finished_run.load("kron"))
    said = f"{NAME} at commit {commit}: the copy in the cache; the Hugging Face Hub cannot be reached."
    assert capsys.readouterr().err.splitlines() == 3 * [said]
    assert refusal("topk") == (
        f"name must be one of kron for {NAME} at commit {commit[:12]}, of which the cache has a part; got 'topk'."
    )
    assert refusal(revision="v1").startswith(
        "source: there is no folder and no copy in the cache of 'user/repo' at revision v1, and the Hugging Face Hub "
        "cannot be reached ("
    )


def unreachable(how: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif how == "no network":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    else:
        hub.broken = True


@pytest.mark.parametrize("how", ["offline", "no network", "broken"])
def test_without_network_and_without_a_copy(how: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    unreachable(how, hub, monkeypatch)
    said = refusal()
    assert said.startswith(
        "source: there is no folder and no copy in the cache of 'user/repo', and the Hugging Face Hub cannot be "
        "reached ("
    )
    assert said.endswith("). Check the name and the network, or give a local folder.")


def test_a_local_folder_comes_first(
    hub: Hub, saes: dict[str, bytes], finished_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(NAME, saes)
    ks.save(finished_run.load("topk"), tmp_path / "user" / "repo")
    monkeypatch.chdir(tmp_path)
    assert same(ks.load(NAME), finished_run.load("topk"))
    assert hub.asked == []


def test_no_such_repository() -> None:
    """Names that the Hub cannot have are refused without asking it."""
    with pytest.raises(UserError, match=r"^source: 'us er/repo' is neither a local path that exists nor a poss"):
        ks.load("us er/repo")


def test_an_unknown_a_private_and_a_gated_repository(
    hub: Hub, saes: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = (
        "source: there is no local path 'user/repo', and the Hugging Face Hub has no public repository of that name. "
        "Check the spelling, or log in with 'hf auth login' if it is private."
    )
    assert refusal() == absent
    hub.add(NAME, saes)
    hub.gated.add(NAME)
    assert refusal() == (
        "source: the repository 'user/repo' is gated on the Hugging Face Hub. Ask for access on its page and log in "
        "with 'hf auth login'."
    )
    hub.repositories[NAME].private = True
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", os.devnull)
    assert refusal() == absent


def test_which_sae(hub: Hub, saes: dict[str, bytes]) -> None:
    commit = hub.add(NAME, saes)
    where = f"name must be one of kron, topk for {NAME} at commit {commit[:12]}; got "
    assert refusal(None) == f"{where}None."
    assert refusal("korn") == f"{where}'korn'. Did you mean 'kron'?"
    assert refusal("../kron").startswith(f"{where}'../kron'.")


def test_nothing_to_load(hub: Hub, tmp_path: Path) -> None:
    commit = hub.add(NAME, {"saes/kron/cfg.json": b"{}", "saes/kron/other.safetensors": b"", "x.bin": b"pickle"})
    assert refusal() == (
        f"user/repo at commit {commit[:12]}, must hold an SAE: a folder with cfg.json and sae_weights.safetensors or "
        "sae.safetensors; it has none. Pickled weights are not read."
    )
    assert hub.fetched() == []


@pytest.mark.parametrize("file", ["params.npz", "ae.pt"])
def test_formats_that_are_read_in_local_folders_only(file: str, hub: Hub) -> None:
    commit = hub.add(NAME, {"layer_12/config.json": b"{}", f"layer_12/{file}": b"x"})
    assert refusal("layer_12") == (
        f"user/repo at commit {commit[:12]}, must hold an SAE: a folder with cfg.json and sae_weights.safetensors or "
        f"sae.safetensors; {file} is not fetched from the Hub. Download the folder that holds it and give its path."
    )
    assert hub.fetched() == []


class TestStrangers:
    @pytest.mark.parametrize(
        "path", ["../../evil.json", "/etc/evil.json", "saes/../../x", "a\\b", "c:x", "saes/kron/./cfg.json", "a\nb", ""]
    )
    def test_paths_out_of_the_repository(self, path: str, hub: Hub, saes: dict[str, bytes], tmp_path: Path) -> None:
        hub.add(NAME, saes)
        hub.listed = [{"type": "file", "path": path, "size": 3, "oid": "0" * 40}]
        assert refusal() == f"user/repo must have files with plain relative paths; it has {path!r}. Do not use it."
        assert hub.fetched() == []
        assert written(tmp_path) == []

    def test_a_config_of_ten_gigabytes(self, hub: Hub, saes: dict[str, bytes], tmp_path: Path) -> None:
        hub.add(NAME, saes)
        hub.sizes["saes/kron/cfg.json"] = 10 * 2**30
        assert refusal() == (
            "user/repo must have configs of at most 16 MB; its saes/kron/cfg.json has 10 GB. It was not downloaded."
        )
        assert hub.fetched() == []
        assert written(tmp_path) == []

    @pytest.mark.parametrize("size", [10 * 2**30, 10])
    def test_weights_larger_or_smaller_than_the_config_implies(
        self, size: int, hub: Hub, saes: dict[str, bytes], tmp_path: Path
    ) -> None:
        hub.add(NAME, saes)
        hub.sizes["saes/kron/sae_weights.safetensors"] = size
        said = refusal()
        assert said.startswith("user/repo: saes/kron/sae_weights.safetensors must have the size that its config implie")
        assert said.endswith("It was not downloaded.")
        assert hub.fetched() == ["saes/kron/cfg.json"]
        assert written(tmp_path) == []

    def test_weights_that_the_config_allows_but_the_machine_does_not(
        self, hub: Hub, saes: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hub.add(NAME, saes)
        monkeypatch.setattr("kronsae.runs.hub_download.available_memory_bytes", lambda: 1000)
        assert refusal().startswith("the weights of user/repo must fit into memory; they have ")
        monkeypatch.setattr("kronsae.support.resources.free_disk_bytes", lambda folder: 1000)
        assert refusal().startswith("the weights of user/repo must fit on the disk; about ")
        assert hub.fetched() == ["saes/kron/cfg.json"]

    @pytest.mark.parametrize(
        "lie",
        [
            {"X_Linked_Size": str(10 * 2**30)},
            {"X_Linked_Etag": '"../../../evil"'},
            {"X_Linked_Etag": f'"{"0" * 64}"'},
            {"X_Repo_Commit": "../evil"},
        ],
    )
    def test_headers_that_differ_from_the_list(
        self, lie: dict[str, str], hub: Hub, saes: dict[str, bytes], tmp_path: Path
    ) -> None:
        hub.add(NAME, saes)
        hub.heads["saes/kron/sae_weights.safetensors"] = lie
        said = refusal()
        assert said.startswith(
            "user/repo: saes/kron/sae_weights.safetensors must be the file that the repository lists ("
        )
        assert hub.fetched() == ["saes/kron/cfg.json"]
        assert written(tmp_path) == []

    def test_content_that_differs_from_the_list(self, hub: Hub, saes: dict[str, bytes], tmp_path: Path) -> None:
        hub.add(NAME, saes)
        path = "saes/kron/sae_weights.safetensors"
        hub.bodies[path] = bytes(len(saes[path]))
        assert refusal() == (
            f"user/repo: {path} must have {len(saes[path]):,} bytes and the digest that the repository lists; the "
            "downloaded file differs and was removed. Try again."
        )
        assert written(tmp_path) == []
        hub.bodies[path] = bytes(2**24)
        assert "the Hub sent more. It was stopped and not kept." in refusal()
        assert written(tmp_path) == []
        hub.bodies.clear()
        ks.load(NAME, "kron")

    def test_a_link_out_of_the_cache(self, hub: Hub, saes: dict[str, bytes], tmp_path: Path) -> None:
        hub.add(NAME, saes)
        path = download(NAME, "kron").folder / "sae_weights.safetensors"
        (tmp_path / "secret").write_bytes(path.read_bytes())
        path.unlink()
        path.symlink_to(tmp_path / "secret")
        assert refusal() == f"user/repo: {path} must be a file in the Hub's cache; it leads to {tmp_path / 'secret'}."

    @pytest.mark.parametrize(
        "config", [b"[1", b"[]", b'{"sae": 3}', b'{"sae": {}, "format": 1}', b"\xff", b"[" * 100_000]
    )
    def test_damaged_configs(self, config: bytes, hub: Hub, saes: dict[str, bytes]) -> None:
        hub.add(NAME, saes | {"saes/kron/cfg.json": config})
        refusal()


def test_a_full_disk(hub: Hub, saes: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, tqdm_class: Any = None, **options: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    hub.add(NAME, saes)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
    assert refusal() == (
        f"user/repo: saes/kron/cfg.json cannot be written to {constants.HF_HUB_CACHE}: the disk is full. Make room, or "
        "set HF_HOME to another disk."
    )


@pytest.mark.slow
def test_in_a_process_of_its_own(hub: Hub, saes: dict[str, bytes], tmp_path: Path) -> None:
    """The environment variables of ``huggingface_hub``, read at its import, are those that count."""
    commit = hub.add(NAME, saes)
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "own"), "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    code = f"import kronsae as ks; print(ks.load('{NAME}', 'kron').config.architecture)"
    for change in ({}, {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}):
        environment = os.environ | settings | {"HF_HUB_DISABLE_XET": "1"} | change
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (0, "kronecker-topk\n"), done.stderr
        assert f"{NAME} at commit {commit}: " in done.stderr


class TestOtherLibraries:
    """A repository of sparsify: a folder per hookpoint, of which one is fetched."""

    @pytest.fixture
    def _saes(self, hub: Hub, tmp_path: Path) -> None:
        sparsify(tmp_path / "layers.1")
        sparsify(tmp_path / "layers.3.mlp", transcode=True)
        places = ("layers.1", "layers.3.mlp")
        hub.add(NAME, {name: one for place in places for name, one in files_of(tmp_path / place, f"{place}/").items()})

    @pytest.mark.usefixtures("_saes")
    def test_a_folder_of_the_repository(self, tmp_path: Path) -> None:
        x = torch.randn(3, 16)
        assert torch.equal(ks.load(f"{NAME}:layers.1")(x), ks.load(tmp_path / "layers.1")(x))
        assert ks.load(f"{NAME}:layers.3.mlp").config.role == "transcoder"
        assert ks.load(NAME, "layers.3.mlp").config.role == "transcoder"

    def test_other_files_of_the_folder_stay(self, hub: Hub, tmp_path: Path) -> None:
        sparsify(tmp_path / "layers.1")
        others = {"layers.1/optimizer.safetensors": b"x", "layers.1/tokenizer.json": bytes(17 * 2**20)}
        hub.add(NAME, files_of(tmp_path / "layers.1", "layers.1/") | others)
        assert same(ks.load(NAME), ks.load(tmp_path / "layers.1"))
        assert hub.fetched() == ["layers.1/cfg.json", "layers.1/sae.safetensors"]

    @pytest.mark.usefixtures("_saes")
    def test_which_folder_must_be_clear(self) -> None:
        assert refusal(None).startswith("name must be one of layers.1, layers.3.mlp for ")
        with pytest.raises(UserError, match=r"^name must be left out for user/repo:layers\.1, which names the folder"):
            ks.load("user/repo:layers.1", "layers.3.mlp")
        with pytest.raises(UserError, match=r"^the source must be a folder or a Hub name \(user/repo, or user/repo:"):
            ks.load("user/repo:")
