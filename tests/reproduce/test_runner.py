"""Studies run from end to end on a tiny scale, and every study is complete."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
from tests.command_line import Kronsae

from kronsae.reproduce import names, study
from kronsae.reproduce.context import Context
from kronsae.reproduce.runner import Result, known_results, run_study
from kronsae.reproduce.scales import SCALES, named_scale
from kronsae.support.errors import UserError
from kronsae.support.files import read_json

TINY = replace(
    SCALES["bundled"],
    name="tiny",
    tokens=1024,
    batch_tokens=256,
    d_sae=64,
    wide=(64,),
    k=4,
    l0s=(4, 8),
    layers=("layers.0", "layers.1", "layers.2"),
    eval_tokens=512,
    eval_ce_tokens=256,
    rates=(1.0, 0.01),
)


def context(folder: Path, seeds: tuple[int, ...] = (0, 1)) -> Context:
    return Context(scale=TINY, folder=folder, seeds=seeds, quiet=True)


@pytest.fixture(scope="module")
def sparsity(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("reproduce")
    return folder, run_study("sparsity", context(folder), folder / "results")


@pytest.mark.parametrize("name", names())
def test_every_study_says_what_it_claims(name: str) -> None:
    one = study(name)
    assert one.name == name
    assert one.claim.endswith(".")
    assert one.title
    assert one.of


def test_an_unknown_study_or_scale_is_named() -> None:
    with pytest.raises(UserError, match=r"got 'sparsty'\. Did you mean 'sparsity'\?"):
        study("sparsty")
    with pytest.raises(UserError, match=r"--scale must be one of .*; got 'lap'"):
        named_scale("lap")


def test_a_study_writes_result_rows_page_and_index(sparsity: tuple[Path, Result]) -> None:
    folder, found = sparsity
    results = folder / "results"
    with (results / "sparsity.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["name"], row["k"], row["seed"]) for row in rows} == {
        (name, k, seed) for name in ("topk", "kron") for k in ("4", "8") for seed in ("0", "1")
    }
    kept = read_json(results / "sparsity.json", "the result")
    assert kept["provenance"]["versions"]["torch"]
    assert [float(row["explained_variance"]) for row in rows] == [row["explained_variance"] for row in kept["rows"]]
    page = (results / "sparsity.md").read_text(encoding="utf-8")
    assert page == found.page
    assert f"**Verdict: {found.study.judge(kept['rows']).holds}.**" in page
    assert "[sparsity](sparsity.md)" in (results / "README.md").read_text(encoding="utf-8")
    assert [one.study.name for one in known_results(results)] == ["sparsity"]


def test_pages_are_written_again_from_the_result_files(sparsity: tuple[Path, Result], kronsae: Kronsae) -> None:
    results = sparsity[0] / "results"
    before = {path.name: path.read_bytes() for path in results.iterdir()}
    for name in ("sparsity.md", "sparsity.csv", "README.md"):
        (results / name).unlink()
    assert kronsae("reproduce", "--pages", "--results", results).status == 0
    assert {path.name: path.read_bytes() for path in results.iterdir()} == before
    refused = kronsae("reproduce", "--pages", "--results", results / "nothing")
    assert refused.sentence.endswith("nothing has none.")


def test_studies_share_trained_saes_and_a_known_result_is_not_measured_again(sparsity: tuple[Path, Result]) -> None:
    folder, found = sparsity
    said: list[str] = []
    again = run_study("sparsity", replace(context(folder), say=said.append), folder / "results")
    assert again.kept == found.kept
    assert said == [f"Already measured with these settings: {folder / 'results' / 'sparsity.json'}."]
    groups = len(list((folder / "trained" / "groups").iterdir()))
    rows = context(folder).train([context(folder).sae("topk", k=4)])
    assert len(list((folder / "trained" / "groups").iterdir())) == groups
    assert {row["name"] for row in rows} == {"topk"}
    (run, saes), *_ = context(folder).runs(rows)
    assert set(saes) <= set(run.saes())  # by the name that the SAE has in the folder of the study that trained it


def test_tuning_takes_the_better_rate_of_the_first_seed_for_all(tmp_path: Path) -> None:
    made = context(tmp_path)
    rows = made.train_tuned({"topk": lambda rate: made.sae("topk", lr=rate * 1e-2)})
    tried = made.train([f"{made.sae('topk', lr=rate * 1e-2)} name=topk.{rate}" for rate in TINY.rates], seeds=(0,))
    best = max(tried, key=lambda row: float(row["explained_variance"]))
    assert [(row["name"], row["seed"], row["lr"]) for row in rows] == [("topk", seed, best["lr"]) for seed in (0, 1)]


def test_the_command_lists_studies_and_refuses_unknown_ones_before_it_runs(kronsae: Kronsae, tmp_path: Path) -> None:
    listed = kronsae("reproduce", "--list")
    assert all(name in listed.out for name in names())
    refused = kronsae("reproduce", "sparsity", "nothing", "--out", str(tmp_path / "out"))
    assert refused.status == 2
    assert "got 'nothing'" in refused.sentence
    assert not list(tmp_path.iterdir())
