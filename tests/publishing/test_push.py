"""Pushing a run to a stand-in of the Hub by the real client, and loading it again."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from tests.command_line import Outcome
from tests.hub_stand_in import TOKEN, Hub

import kronsae as ks
from kronsae.core.sae import SAE
from kronsae.interop import formats
from kronsae.publishing.push import push_run
from kronsae.runs.hub_download import download
from kronsae.runs.imported import Place, import_saes
from kronsae.runs.run import Run
from kronsae.support.errors import UserError

NAME = "user/repo"
FILES = [
    "README.md",
    "saes/kron/cfg.json",
    "saes/kron/sae_weights.safetensors",
    "saes/topk/cfg.json",
    "saes/topk/sae_weights.safetensors",
]

Kronsae = Callable[..., Outcome]

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own upload


def same(one: SAE, other: SAE) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == other_name and torch.equal(value, mine) for (name, value), (other_name, mine) in pairs)


def files(hub: Hub, branch: str = "main") -> dict[str, bytes]:
    repository = hub.repositories[NAME]
    return {
        path: content for path, content in repository.commits[repository.branches[branch]].items() if path[0] != "."
    }


def assert_no_places(hub: Hub, run: Run) -> None:
    """Assert that no uploaded text names a place on this machine."""
    local = run.config.model.name, run.config.text.source, str(Path.home())
    everything = b"".join(content for path, content in files(hub).items() if path.endswith((".md", ".json")))
    assert not any(place.encode() in everything for place in local)


def test_push_then_load_gives_the_same_bits(hub: Hub, finished_run: Run, kronsae: Kronsae) -> None:
    done = kronsae("push", finished_run.folder, NAME, "--private", "--json")
    assert done.status == 0, done.err
    assert done.json["files"].keys() == files(hub).keys() == set(FILES)
    assert done.json["commit"] == hub.repositories[NAME].branches["main"]
    assert done.json["url"] == f"{hub.url}/{NAME}/commit/{done.json['commit']}"
    assert "Licence of the weights: apache-2.0." in done.err
    assert f'What now? ks.load("{NAME}", NAME) in Python' in done.err
    assert hub.repositories[NAME].private
    for name in ("topk", "kron"):
        assert same(ks.load(NAME, name), finished_run.load(name))
    assert_no_places(hub, finished_run)


def test_folders_for_saelens_beside_ours(hub: Hub, finished_run: Run) -> None:
    pushed = push_run(finished_run, NAME, formats=["saelens"])
    assert sorted(set(pushed.files) - set(FILES)) == [
        f"saelens/{name}/{file}" for name in ("kron", "topk") for file in ("cfg.json", "sae_weights.safetensors")
    ]
    x = torch.randn(20, finished_run.load("topk").d_in)
    for name in ("topk", "kron"):
        assert same(ks.load(NAME, name), finished_run.load(name))
        read = formats.read(download(NAME, f"saelens/{name}").folder).sae
        torch.testing.assert_close(read(x), finished_run.load(name)(x), rtol=1e-5, atol=1e-5)
    assert_no_places(hub, finished_run)
    stated = json.loads(files(hub)["saelens/topk/cfg.json"])["metadata"]
    assert stated["model_name"] == Path(finished_run.config.model.name).name
    assert stated["dataset_path"] == Path(finished_run.config.text.source).name


def test_names_branch_licence_and_a_second_push(hub: Hub, finished_run: Run, kronsae: Kronsae) -> None:
    assert kronsae("push", finished_run.folder, NAME, "topk").status == 0
    first = hub.repositories[NAME].branches["main"]
    done = kronsae("push", finished_run.folder, NAME, "kron", "--revision", "v2", "--license", "mit")
    assert (done.status, done.out.strip()) == (0, f"{hub.url}/{NAME}/commit/{hub.repositories[NAME].branches['v2']}")
    assert 'revision="v2"' in done.err
    assert hub.repositories[NAME].branches["main"] == first
    assert [path for path in files(hub) if "kron" in path] == []
    assert [path for path in files(hub, "v2") if "kron" in path] == FILES[1:3]
    assert b"license: mit" in files(hub, "v2")["README.md"]
    assert same(ks.load(NAME, "kron", revision="v2"), finished_run.load("kron"))


def test_a_name_that_is_given_twice_is_one_sae(finished_run: Run) -> None:
    pushed = push_run(finished_run, NAME, ["kron", "kron"], dry_run=True)
    assert list(pushed.files) == [file for file in FILES if "topk" not in file]


def test_a_dry_run_asks_nobody(hub: Hub, finished_run: Run, kronsae: Kronsae) -> None:
    done = kronsae("push", finished_run.folder, NAME, "kron", "--dry-run")
    assert done.status == 0
    assert done.out.startswith(
        "---\nlibrary_name: kronsae\n" if "library_name" in done.out.splitlines()[1] else "---\n"
    )
    assert "Nothing was uploaded." in done.err
    assert "saes/kron/sae_weights.safetensors: " in done.err
    assert hub.asked == []
    words = ["push", str(finished_run.folder), NAME, "kron", "--license", "mit", "--private", "--revision", "v2"]
    assert f"What now? kronsae {shlex.join(words)}\n" in kronsae(*words, "--dry-run").err
    done = kronsae("push", finished_run.folder, NAME, "kron", "--dry-run", "--json")
    assert done.json["commit"] is None
    assert done.json["card"].startswith("---\n")


def refusal(finished_run: Run, repository: str = NAME, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        push_run(finished_run, repository, **options)  # type: ignore[arg-type]
    return str(caught.value)


def test_what_is_refused(hub: Hub, finished_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(finished_run, "repo") == "the repository must be user/repo on the Hub; got 'repo'."
    assert refusal(finished_run, "us er/repo") == "the repository must be user/repo on the Hub; got 'us er/repo'."
    assert refusal(finished_run, names=["korn"]).endswith("got 'korn'. Did you mean 'kron'?")
    assert refusal(finished_run, formats=["sealens"]) == (
        "--with must be one of saelens; got 'sealens'. Did you mean 'saelens'?"
    )
    hub.add(NAME, {})
    assert refusal(finished_run, private=True) == (
        "--private must be used with a new or private repository; user/repo exists and is public. Change it in its "
        "settings on the Hub, or leave --private out."
    )
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert refusal(finished_run, "user/other") == (
        "'user/other' must be a repository that you may write to; the Hub refuses (status 401). Run 'hf auth login' "
        "with a token that has write access, or name another repository."
    )
    assert "user/other" not in hub.repositories
    assert files(hub) == {}


def test_an_imported_run_is_refused(hub: Hub, finished_run: Run, tmp_path: Path) -> None:
    place = Place(text=finished_run.config.text.source)
    run = import_saes([finished_run.sae_folder("kron")], tmp_path / "imported", place)
    assert refusal(run) == (
        f"the run must be one that kronsae trained; {run.folder} holds imported SAEs (kron), which are not uploaded. "
        "Give the folder of a training."
    )
    assert hub.asked == []


def test_without_network(hub: Hub, finished_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said = refusal(finished_run)
    assert said.startswith("the upload to 'user/repo' failed (")
    assert said.endswith("). Check the network and try again; nothing was committed.")


@pytest.mark.slow
def test_the_command_in_a_process_of_its_own(hub: Hub, finished_run: Run, tmp_path: Path) -> None:
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "own"), "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    environment = os.environ | settings | {"HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "kronsae", "push", str(finished_run.folder), NAME]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(files(hub)) == FILES
