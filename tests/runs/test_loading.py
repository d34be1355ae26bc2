"""Loading of SAEs from run folders, SAE folders and the Hub, and its errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tests.interop.foreign_saes import D_SAE, dictionary_learning
from tests.tiny_models import WIDTH

import kronsae as ks
from kronsae.core.sae import SAE
from kronsae.runs.run import Run
from kronsae.support.errors import UserError
from kronsae.support.sealed import write_sealed


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


def test_a_run_of_several_saes_needs_a_name(finished_run: Run) -> None:
    with pytest.raises(UserError) as caught:
        ks.load(finished_run.folder)
    folder = finished_run.folder
    assert str(caught.value) == (
        f"{folder} holds 2 SAEs: kron, topk. Give the name or the folder of one of them: 'kron', or {folder}/saes/kron."
    )


@pytest.mark.parametrize(
    ("name", "got"), [("korn", "'korn'. Did you mean 'kron'?"), ("../kron", "'../kron'. Did you mean")]
)
def test_a_name_that_is_none(name: str, got: str, finished_run: Run) -> None:
    with pytest.raises(UserError) as caught:
        ks.load(finished_run.folder, name)
    assert str(caught.value).startswith(f"name must be one of kron, topk for {finished_run.folder}; got {got}")


def test_a_folder_without_an_sae(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        ks.load(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} must hold an SAE; it has neither cfg.json nor a finished run's saes/ folder nor other folders "
        "with an SAE."
    )


@pytest.mark.parametrize("source", ["/no/such/run", "./run", "run", "~/run"])
def test_no_folder(source: str) -> None:
    with pytest.raises(UserError) as caught:
        ks.load(source)
    assert str(caught.value) == (
        f"the source must be a folder or a Hub name (user/repo, or user/repo/folder); got {source}. Check the path."
    )


def test_a_folder_that_holds_folders_of_saes(tmp_path: Path) -> None:
    """Such as a copy of a repository of dictionary_learning."""
    place = tmp_path / "pythia" / "resid_post_layer_2"
    for number in (0, 10, 2):
        dictionary_learning(place / f"trainer_{number}", "BatchTopKSAE", layer=number)
    (place / "trainer_3").mkdir()
    (place / "trainer_3" / "ae.pt").write_bytes(b"")  # without a config, it is none
    with pytest.raises(UserError) as caught:
        ks.load(place)
    assert str(caught.value) == (
        f"{place} holds 3 SAEs: trainer_0, trainer_2, trainer_10. Give the name or the folder of one of them: "
        f"'trainer_0', or {place}/trainer_0."
    )
    assert same(ks.load(place, "trainer_2"), ks.load(place / "trainer_2"))
    assert same(ks.load(tmp_path, "pythia/resid_post_layer_2/trainer_2"), ks.load(place / "trainer_2"))
    with pytest.raises(UserError, match=r"got 'trainer_11'\. Did you mean 'trainer_10'\?$"):
        ks.load(place, "trainer_11")
    shutil.rmtree(place / "trainer_0")
    shutil.rmtree(place / "trainer_10")
    assert same(ks.load(tmp_path), ks.load(place / "trainer_2"))


def test_folders_deep_below_and_hidden_ones_are_not_looked_into(tmp_path: Path) -> None:
    for folder in ("a/b/c/d/e/f", ".cache/sae"):
        dictionary_learning(tmp_path / folder, "BatchTopKSAE")
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b", target_is_directory=True)
    with pytest.raises(UserError, match=r" must hold an SAE; it has neither "):
        ks.load(tmp_path)
    assert ks.load(tmp_path / "a").d_sae == D_SAE


def test_a_damaged_sae(finished_run: Run, tmp_path: Path) -> None:
    shutil.copytree(finished_run.folder / "saes", tmp_path / "saes")
    (tmp_path / "saes" / "kron" / "sae_weights.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match=r"is damaged: .*\. Save or download it again\.$"):
        ks.load(tmp_path, "kron")
    config = tmp_path / "saes" / "topk" / "cfg.json"
    write_sealed(config, json.loads(config.read_text()) | {"format": 99})
    with pytest.raises(UserError, match=r"has format 99; this version reads format 1\."):
        ks.load(tmp_path, "topk")


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", ""])
def test_a_device_that_is_not_there(device: str, finished_run: Run) -> None:
    with pytest.raises(UserError, match=f"device must be one that this machine .* have; got '{device}'"):
        ks.load(finished_run.folder, "topk", device=device)


def test_a_revision_is_for_the_hub(finished_run: Run) -> None:
    with pytest.raises(UserError) as caught:
        ks.load(finished_run.folder, "kron", revision="main")
    assert str(caught.value) == (
        f"revision is for repositories of the Hub; got 'main' with the folder {finished_run.folder}."
    )


def test_sizes_that_no_machine_has(finished_run: Run, tmp_path: Path) -> None:
    """A config of a stranger may claim any size; nothing of that size is built."""
    for part, sizes in (
        ("topk", {"d_sae": 10**12}),
        ("topk", {"d_sae": 10**30}),
        ("kron", {"num_heads": 10**11, "d_sae": 4 * 10**11}),
    ):
        folder = tmp_path / f"{part}-{len(str(sizes))}"
        shutil.copytree(finished_run.folder / "saes" / part, folder)
        about = json.loads((folder / "cfg.json").read_text())
        about["sae"]["encoder"] |= sizes
        write_sealed(folder / "cfg.json", about)
        with pytest.raises(UserError, match=r"does not fit cfg\.json \(|d_sae must be at most"):
            ks.load(folder)


def test_a_product_of_sizes_that_no_tensor_has(tmp_path: Path) -> None:
    ks.save(ks.topk(d_sae=8, k=2).shape(4).build(), tmp_path)
    about = json.loads((tmp_path / "cfg.json").read_text())
    about["sae"]["encoder"]["d_sae"] = about["sae"]["d_in"] = 10**12
    write_sealed(tmp_path / "cfg.json", about)
    with pytest.raises(UserError) as caught:
        ks.load(tmp_path)
    assert str(caught.value) == (
        "the sizes of an SAE must fit into memory; got d_in=1000000000000, d_sae=1000000000000, k=2. Use smaller ones."
    )
