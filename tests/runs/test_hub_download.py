"""Loading from the Hub, by the real client of ``huggingface_hub``, from a stand-in of its interface."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from tests.hub_stand_in import TOKEN, Hub, files_of
from tests.interop.foreign_saes import dictionary_learning, gemma_scope, sparsify
from tests.interop.mutations import Payload

import kronsae as ks
from kronsae.core.sae import SAE
from kronsae.interop import formats
from kronsae.runs.hub_download import download, hub_place
from kronsae.runs.run import Run
from kronsae.support.errors import UserError

NAME = "user/repo"


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
    assert refusal(None) == (
        f"{NAME} at commit {commit[:12]} holds 2 SAEs: kron, topk. Give the name or the folder of one of them: 'kron', "
        f"or {NAME}/saes/kron."
    )
    assert refusal("korn") == f"{where}'korn'. Did you mean 'kron'?"
    assert refusal("../kron").startswith(f"{where}'../kron'.")


def test_nothing_to_load(hub: Hub) -> None:
    files = {"saes/kron/cfg.json": b"{}", "saes/kron/other.safetensors": b"", "x.bin": b"pickle", "a/ae.pt": b"pickle"}
    commit = hub.add(NAME, files)
    assert refusal() == (
        f"user/repo at commit {commit[:12]} must hold an SAE, a folder with cfg.json and sae_weights.safetensors; "
        "params.npz; cfg.json and sae.safetensors; config.json and ae.pt; it has none. Other files are not read."
    )
    assert hub.fetched() == []


@pytest.mark.parametrize(
    ("source", "place"),
    [
        ("user/repo", ("user/repo", None)),
        ("user/repo/", ("user/repo", None)),
        ("user/repo:layers.1", ("user/repo", "layers.1")),
        ("user/repo/a/b_2/c", ("user/repo", "a/b_2/c")),
        *((wrong, None) for wrong in ("user", "user/", "/user/repo", "./user/repo", "~/a/b", "user/repo:", "a/b/c:d")),
    ],
)
def test_names_on_the_hub(source: str, place: tuple[str, str | None] | None) -> None:
    assert hub_place(source) == place


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
        assert refusal().startswith("the weights of user/repo must fit into memory; ")
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
    """Repositories of other libraries: a folder per SAE, of which one is fetched."""

    @pytest.fixture
    def _saes(self, hub: Hub, tmp_path: Path) -> None:
        sparsify(tmp_path / "layers.1")
        sparsify(tmp_path / "layers.3.mlp", transcode=True)
        places = ("layers.1", "layers.3.mlp")
        hub.add(NAME, {name: one for place in places for name, one in files_of(tmp_path / place, f"{place}/").items()})

    @pytest.mark.usefixtures("_saes")
    def test_a_folder_of_the_repository(self, tmp_path: Path) -> None:
        x = torch.randn(3, 16)
        for source in (f"{NAME}:layers.1", f"{NAME}/layers.1", f"{NAME}/layers.1/"):
            assert torch.equal(ks.load(source)(x), ks.load(tmp_path / "layers.1")(x))
        assert ks.load(f"{NAME}/layers.3.mlp").config.role == "transcoder"
        assert ks.load(NAME, "layers.3.mlp").config.role == "transcoder"

    def test_other_files_of_the_folder_stay(self, hub: Hub, tmp_path: Path) -> None:
        sparsify(tmp_path / "layers.1")
        others = {"layers.1/optimizer.safetensors": b"x", "layers.1/config.json": bytes(17 * 2**20)}
        hub.add(NAME, files_of(tmp_path / "layers.1", "layers.1/") | others)
        assert same(ks.load(NAME), ks.load(tmp_path / "layers.1"))
        assert hub.fetched() == ["layers.1/cfg.json", "layers.1/sae.safetensors"]

    def test_the_config_of_the_run_of_sparsify(self, hub: Hub, tmp_path: Path) -> None:
        sparsify(tmp_path / "sae")
        run = json.dumps({"hookpoints": ["layers.1"], "model": "EleutherAI/pythia-70m"}).encode()
        hub.add(NAME, files_of(tmp_path / "sae", "run/layers.1/seed3/") | {"run/config.json": run, "config.json": b"{"})
        found = formats.read(download(NAME).folder)
        assert (found.model, found.hook_read) == ("EleutherAI/pythia-70m", "layers.1")
        assert hub.fetched() == [
            *(f"run/layers.1/seed3/{file}" for file in ("cfg.json", "sae.safetensors")),
            "run/config.json",
        ]

    @pytest.mark.usefixtures("_saes")
    def test_which_folder_must_be_clear(self) -> None:
        assert " holds 2 SAEs: layers.1, layers.3.mlp. Give the name or the folder of one of them: 'layers.1', or " in (
            refusal(None)
        )
        with pytest.raises(UserError, match=r"^name must be left out for user/repo:layers\.1, which names the folder"):
            ks.load("user/repo:layers.1", "layers.3.mlp")
        with pytest.raises(UserError, match=r"^the source must be a folder or a Hub name \(user/repo, or user/repo/"):
            ks.load("user/repo:")

    @pytest.mark.parametrize("revision", [None, "v1"])
    def test_gemma_scope(self, revision: str | None, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It has no config: model, hook and l0 are in the names of repository and folders."""
        name = "google/gemma-scope-2b-pt-res"
        folders = [f"layer_{layer}/width_16k/average_l0_{l0}" for layer, l0 in ((2, 18), (10, 77), (10, 9))]
        for seed, folder in enumerate(folders):
            gemma_scope(tmp_path / folder, seed)
        commit = hub.add(name, files_of(tmp_path, "") | {"layer_2/README.md": b"x"})
        hub.repositories[name].branches["v1"] = commit
        sae = ks.load(f"{name}/{folders[1]}", revision=revision)
        assert hub.fetched() == [f"{folders[1]}/params.npz"]
        assert same(sae, ks.load(tmp_path / folders[1]))
        found = formats.read(download(name, folders[1], revision).folder)
        assert (found.model, found.hook_read) == ("google/gemma-2-2b", "blocks.10.hook_resid_post")
        assert found.settings == {"l0": 77.0}
        assert same(ks.load(name, "layer_2", revision=revision), ks.load(tmp_path / folders[0]))
        with pytest.raises(UserError) as caught:
            ks.load(f"{name}/layer_10")
        assert str(caught.value) == (
            f"layer_10 of {name} at commit {commit[:12]} holds 2 SAEs: layer_10/width_16k/average_l0_9, "
            "layer_10/width_16k/average_l0_77. Give the name or the folder of one of them: "
            f"'layer_10/width_16k/average_l0_9', or {name}/layer_10/width_16k/average_l0_9."
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert same(ks.load(f"{name}/{folders[1]}", revision=revision), sae)

    def test_dictionary_learning(self, hub: Hub, tmp_path: Path) -> None:
        for number, kind in enumerate(("AutoEncoderTopK", "BatchTopKSAE")):
            dictionary_learning(tmp_path / "pythia" / "resid_post_layer_2" / f"trainer_{number}", kind)
        hub.add(NAME, files_of(tmp_path) | {"pythia/resid_post_layer_2/trainer_0/eval_results.json": b"{}"})
        place = "pythia/resid_post_layer_2/trainer_0"
        assert same(ks.load(f"{NAME}/{place}"), ks.load(tmp_path / place))
        assert hub.fetched() == [f"{place}/config.json", f"{place}/ae.pt"]
        assert same(ks.load(NAME, "pythia/resid_post_layer_2/trainer_1"), ks.load(tmp_path, place[:-1] + "1"))
        assert "Did you mean 'pythia/resid_post_layer_2/trainer_1'?" in refusal("resid_post_layer_2/trainer_1")

    @pytest.mark.parametrize("config", [b"[1", b"[]", b"\xff", b"[" * 100_000])
    def test_weights_of_a_damaged_config_are_not_fetched(self, config: bytes, hub: Hub, tmp_path: Path) -> None:
        dictionary_learning(tmp_path / "sae", "AutoEncoderTopK")
        hub.add(NAME, files_of(tmp_path / "sae") | {"config.json": config})
        assert "config.json" in refusal(None)
        assert hub.fetched() == ["config.json"]

    @pytest.mark.parametrize("file", ["params.npz", "ae.pt", "sae.safetensors"])
    def test_strangers(self, file: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Weights that could not be read in the memory there is are not fetched; wrong contents are not kept."""
        write: dict[str, Callable[[Path], Any]] = {
            "params.npz": gemma_scope,
            "ae.pt": partial(dictionary_learning, kind="BatchTopKSAE"),
            "sae.safetensors": sparsify,
        }
        write[file](tmp_path / "source")
        files = files_of(tmp_path / "source")
        hub.add(NAME, files)
        configs = [name for name in files if name != file]
        with monkeypatch.context() as patch:
            patch.setattr("kronsae.runs.hub_download.available_memory_bytes", lambda: len(files[file]))
            assert refusal(None).startswith("the weights of user/repo must fit into memory; ")
        assert hub.fetched() == configs
        hub.bodies[file] = bytes(len(files[file]))
        assert refusal(None) == (
            f"user/repo: {file} must have {len(files[file]):,} bytes and the digest that the repository lists; the "
            "downloaded file differs and was removed. Try again."
        )
        assert [path.name for path in (tmp_path / "home").rglob(file)] == []
        hub.bodies.clear()
        assert same(ks.load(NAME), ks.load(tmp_path / "source"))

    def test_a_pickle_that_would_run_code(self, hub: Hub, tmp_path: Path) -> None:
        dictionary_learning(tmp_path / "sae", "AutoEncoderTopK")
        torch.save({"encoder.weight": Payload(tmp_path / "made")}, tmp_path / "sae" / "ae.pt")
        hub.add(NAME, files_of(tmp_path / "sae"))
        assert "its pickle holds a reference to io.open" in refusal(None)
        assert not (tmp_path / "made").exists()
