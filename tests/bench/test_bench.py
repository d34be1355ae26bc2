"""Benchmarks: what they report, what they refuse, and that every contestant trains the same thing."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.command_line import Kronsae
from torch import Tensor
from typer.testing import CliRunner

from kronsae import kernels
from kronsae.bench import checks, measure, runs, subjects
from kronsae.bench.machine import peak_bytes
from kronsae.bench.measure import Timing
from kronsae.bench.plot import plot_grid
from kronsae.bench.subjects import Entry, Shape
from kronsae.cli.bench import app
from kronsae.support.errors import UserError
from kronsae.support.provenance import provenance_columns

SMALL = Shape(d_in=16, num_heads=8, d_base=2, d_extension=3, k=4, batch=32)
OWN = ["--only", "kronsae", "--only", "encoder_product", "--only", "paper_listing", "--only", "topk"]
SIZES = ["--d-in", "16", "--num-heads", "8", "--d-base", "2", "--d-extension", "3", "--k", "4", "--batch", "32"]


def test_step_prints_medians_under_the_contestants_names(tmp_path: Path) -> None:
    file = tmp_path / "new" / "step.csv"
    result = CliRunner().invoke(app, ["step", *SIZES, *OWN, "--rounds", "2", "--json", "--csv", str(file)])
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    for name in ("encoder_product", "kronsae", "topk", "paper_listing"):
        assert figures[name] > 0
    assert figures["ratios"]["paper_listing"] == pytest.approx(figures["paper_listing"] / figures["kronsae"], rel=0.2)
    assert figures["sizes"] == {**vars(SMALL), "d_sae": 48}
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    assert {row["subject"] for row in rows} == {"encoder_product", "kronsae", "topk", "paper_listing"}
    for column in ("machine", "commit", "versions", "seed", "low_quartile_ms", "high_quartile_ms"):
        assert all(row[column] for row in rows)


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Entry("sparsify", subjects.Sparsify, ("a_package_nobody_has", "eai-sparsify"))
    monkeypatch.setattr(runs, "REGISTRY", (entry, subjects.REGISTRY[0]))
    result = runs.step(SMALL, rounds=2)
    assert result.unavailable == {"sparsify": "eai-sparsify is not installed (pip install 'kronsae[bench]')"}
    assert set(result.timings) == {"encoder_product"}


PEERS = {
    "sparsify": """
import torch
print("sparsify prints when imported")

class SparseCoderConfig:
    def __init__(self, **sizes):
        print("sparsify prints when built")

class SparseCoder(torch.nn.Module):
    def __init__(self, d_in, config, device, dtype):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(d_in))

    def forward(self, x_BD):
        print("sparsify prints in a step")
        self.fvu = (x_BD * self.weight).square().mean()
        return self

    def set_decoder_norm_to_unit_norm(self):
        pass
""",
    "sae_lens": """
import sys, types
import torch
print("sae_lens prints when imported")
sae = types.ModuleType("sae_lens.saes.sae")
sae.TrainStepInput = dict
sys.modules |= {"sae_lens.saes": types.ModuleType("sae_lens.saes"), sae.__name__: sae}

class TopKTrainingSAEConfig:
    def __init__(self, **sizes):
        print("sae_lens prints when built")
        self.sizes = sizes

class TopKTrainingSAE(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.W_dec = torch.nn.Parameter(torch.ones(config.sizes["d_sae"], config.sizes["d_in"]))

    def training_forward_pass(self, given):
        print("sae_lens prints in a step")
        self.loss = (given["sae_in"] @ self.W_dec.T).square().mean()
        return self
""",
}


@pytest.fixture
def printing_peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stand-ins for the packages of the ``bench`` extra, which print on stdout."""
    for name, source in PEERS.items():
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in PEERS]:
        del sys.modules[name]


@pytest.mark.usefixtures("printing_peers")
def test_what_other_packages_print_does_not_get_into_the_json(kronsae: Kronsae) -> None:
    peers = ("--only", "sparsify", "--only", "saelens")
    outcome = kronsae("bench", "step", *SIZES, *OWN, *peers, "--rounds", 2, "--json")
    assert outcome.status == 0
    for name in PEERS:
        assert outcome.json[name.replace("_", "")] > 0
        for when in ("when imported", "when built", "in a step"):
            assert f"{name} prints {when}" in outcome.err


def test_nothing_is_reported_when_an_operation_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.kronecker_topk

    def wrong(pre_BHP: Tensor, d_base: int, k: int) -> object:
        return right(-pre_BHP, d_base, k)

    monkeypatch.setattr(checks, "kronecker_topk", wrong)
    with pytest.raises(UserError, match=r"must be correct before they are timed; got a wrong kronecker_topk"):
        runs.step(SMALL, rounds=2)


def test_an_unknown_contestant_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"only must name contestants among .* got 'kronsa'\. Did you mean 'kronsae'"):
        runs.step(SMALL, only=["kronsa"])


def test_sizes_are_checked() -> None:
    with pytest.raises(UserError, match="batch must be at least 1; got 0"):
        Shape(batch=0)
    with pytest.raises(UserError, match=r"k must be at most num_heads \* d_base \* d_extension = 4; got 5"):
        Shape(num_heads=1, d_base=2, d_extension=2, k=5)


@pytest.mark.parametrize("entry", subjects.REGISTRY, ids=lambda entry: entry.name)
def test_every_contestant_learns(entry: Entry) -> None:
    reason = entry.missing()
    if reason is not None:
        pytest.skip(reason)
    subject = entry.build(SMALL)
    x_BD = measure.make_batches(32, 16, seed=0)[0]
    weights = list(getattr(getattr(subject, "member", subject), "sae", torch.nn.Module()).parameters())
    before = [weight.detach().clone() for weight in weights]
    subject.step(x_BD)
    for weight, old in zip(weights, before, strict=True):
        assert not torch.equal(weight, old)


def test_the_listing_is_the_library_with_its_gate() -> None:
    from kronsae.core.encoders import KroneckerEncoderConfig
    from kronsae.core.sae import SAEConfig
    from kronsae.core.sparsifiers import TopKConfig

    listing = subjects.PaperListing(SMALL)
    encoder = KroneckerEncoderConfig(num_heads=8, d_base=2, d_extension=3, gate="mand_eps")
    sae = SAEConfig(d_in=16, encoder=encoder, sparsifier=TopKConfig(k=4)).build()
    with torch.no_grad():
        sae.encoder.weight.copy_(listing.encoder.weight.view(8, 5, 16))
        sae.encoder.bias.zero_()
        sae.decoder.W_dec.copy_(listing.W_dec)
        x_BD = torch.randn(64, 16)
        kept = (sae.encode(x_BD).values > 0.0033).all(1)  # of tokens with k positive pairs, the choice is the same
        assert kept.any()
        torch.testing.assert_close(sae(x_BD)[kept], listing(x_BD)[kept], rtol=1e-4, atol=1e-6)


def test_interleaving_takes_turns() -> None:
    order: list[str] = []

    class Named:
        def __init__(self, name: str) -> None:
            self.name = name

        def step(self, x_BD: Tensor) -> None:
            order.append(self.name)

    timings = measure.interleaved({"a": Named("a"), "b": Named("b")}, 2, 3, rounds=3, seed=0, warmup=1)
    assert order == ["a", "b"] * 4
    assert timings["a"].rounds == 3
    assert Timing.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Timing(3.0, 2.0, 4.0, 5)


@pytest.mark.slow
@pytest.mark.skipif(peak_bytes() is None, reason="needs Linux to tell a process's peak memory")
def test_memory_and_scaling_in_processes_of_their_own() -> None:
    result = runs.memory(SMALL)
    assert result.extra_bytes >= 0
    assert result.pre_latent_bytes == 4 * 32 * 8 * 5
    [point] = runs.scaling(d_in=16, num_heads=8, k=4, batch=32, rounds=2, cells=[(2, 2)])
    assert point.shape.d_sae == 32
    assert point.peak_bytes > 0
    assert point.tokens_per_second > 0


def test_the_grid_skips_what_does_not_fit() -> None:
    [small, large] = runs.grid(widths=(8, 4096), sizes=(2048,), batch=16, rounds=2, memory_bytes=2**25)
    assert set(small.timings) == {"encoder_product", "kronsae", "topk"}
    assert large.skipped is not None
    assert large.skipped.startswith("needs ")


def test_sparsifiers_are_compared_with_topk_at_one_l0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "SPARSIFIER_SIZES", ((8, 64), (8, 128)))
    file = tmp_path / "sparsifiers.csv"
    options = ["--k", "4", "--batch", "32", "--rounds", "2", "--csv", str(file), "--json"]
    result = CliRunner().invoke(app, ["sparsifiers", *options])
    assert result.exit_code == 0, result.output
    points = json.loads(result.stdout)["points"]
    assert {(row["encoder"], row["sparsifier"], row["d_sae"]) for row in points} == {
        (encoder, sparsifier, size)
        for encoder in ("dense", "kron")
        for sparsifier in ("topk", "batch_topk", "jumprelu")
        for size in (64, 128)
    }
    for row in points:
        assert row["l0"] == pytest.approx(4, abs=0.5)
        assert row["places_per_token"] >= 4
        assert row["sparsifier"] != "topk" or row["ratio_to_topk"] == 1
    with file.open() as lines:
        assert all(row["commit"] and row["low_quartile_ratio"] for row in csv.DictReader(lines))


def test_the_checks_cover_every_sparsifier(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.linear_above

    def wrong(x_BD: Tensor, weight_PD: Tensor, bias_P: Tensor, thresholds_P: Tensor) -> object:
        return right(x_BD, weight_PD, bias_P, 1.5 * thresholds_P)

    monkeypatch.setattr(kernels, "linear_above", wrong)
    with pytest.raises(UserError, match=r"got a wrong .* in dense with jumprelu"):
        checks.check_operations()


def test_the_grid_is_plotted(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    points = runs.grid(widths=(8, 16, 4096), sizes=(512, 2048), batch=16, rounds=2, memory_bytes=2**22)
    plot_grid(points, tmp_path / "grid.svg")
    text = (tmp_path / "grid.svg").read_text()
    assert "TopK, F = 512" in text
    assert "KronSAE, F = 2,048" in text
    with pytest.raises(UserError, match=r"plot must end in \.svg, \.png or \.pdf; got '.*grid\.txt'"):
        plot_grid(points, tmp_path / "grid.txt")


def test_provenance_names_machine_versions_and_commit() -> None:
    row = provenance_columns(7)
    assert row["seed"] == 7
    assert "torch" in str(row["versions"])
    assert "cores" in str(row["machine"])
