"""The model card: what it states, and that the code it shows runs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from tests.tiny_models import WIDTH

import kronsae as ks
from kronsae.core.gates import GateName
from kronsae.core.sae import SAE
from kronsae.publishing.card import model_card, plain_code
from kronsae.publishing.public import origin_of, public_config
from kronsae.runs.evaluation import evaluate_run
from kronsae.runs.run import Run, open_run
from kronsae.support.errors import UserError
from kronsae.support.sealed import write_sealed
from kronsae.training.config import MemberConfig


def front(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return found


def test_what_the_card_states(finished_run: Run) -> None:
    card = model_card(finished_run, "user/repo", ["topk", "kron"])
    assert front(card) == {
        "library_name": "kronsae",
        "license": "apache-2.0",
        "tags": ["kronsae", "sparse-autoencoder", "mechanistic-interpretability", "dense", "kronecker"],
    }
    for said in (
        "# repo\n",
        "2 sparse autoencoders (SAEs) trained on activations of the language model `gpt_neox0` (a local file or folder",
        "| kron | kronecker-topk | d_in=16, d_sae=32, k=4, num_heads=8, d_base=2, d_extension=2 | `layers.2` |",
        "Budget: 1,280 tokens, 64 tokens per step.",
        "| topk | dense-topk | 0.0008 | 0.1 | center_and_scale | 0 |",
        'sae = ks.load("user/repo", "topk")',
        "`kronsae push --with saelens` uploads them.",
        "The weights are licensed under apache-2.0.",
    ):
        assert said in card
    assert str(finished_run.config.model.name) not in card
    assert finished_run.config.text.source not in card


def test_the_figures_are_those_of_the_evaluation(finished_run: Run, tmp_path: Path) -> None:
    shutil.copytree(finished_run.folder, tmp_path / "run")
    run = open_run(tmp_path / "run")
    (run.folder / "evaluation.json").unlink(missing_ok=True)
    said = "These SAEs were not evaluated: the run holds no evaluation"
    assert said in model_card(run, "user/repo", ["kron"])
    row = next(row for row in evaluate_run(run) if row["name"] == "kron")
    card = model_card(run, "user/repo", ["kron"])
    assert said not in card
    figures = [f"{row[key]:.4f}" for key in ("explained_variance", "ce_recovered", "kl_recovered")]
    assert f"| kron | {figures[0]} | {row['l0']:.1f} | {row['dead_share']:.1%} | {figures[1]} | {figures[2]} |" in card
    assert "| topk |" not in card


def test_saelens_and_the_licence(finished_run: Run) -> None:
    card = model_card(finished_run, "user/repo", ["kron"], license="cc-by-4.0", with_saelens=True)
    assert front(card)["license"] == "cc-by-4.0"
    assert front(card)["tags"][-1] == "saelens"
    assert "import kronsae.interop.saelens" in card
    assert 'SAE.from_pretrained("user/repo", "saelens/kron")' in card
    assert "import kronsae.interop.saelens" not in model_card(finished_run, "user/repo", ["topk"], with_saelens=True)
    with pytest.raises(UserError) as caught:
        model_card(finished_run, "user/repo", ["kron"], license="Apache 2")
    assert str(caught.value) == (
        "license must be an identifier of the Hub in lower case, such as apache-2.0, mit or cc-by-4.0; got 'Apache 2'."
    )


def test_origins(tmp_path: Path) -> None:
    assert origin_of("EleutherAI/pythia-70m").hub_name == "EleutherAI/pythia-70m"
    assert origin_of("gpt2").hub_name == "gpt2"
    for local in (str(tmp_path), "./x", "/home/someone/model", "~/model", r"C:\Users\someone\model"):
        assert origin_of(local).hub_name is None
        assert not re.search(r"[/\\]", origin_of(local).name)
    assert str(origin_of("bundled")) == "`bundled` (part of the kronsae package)"
    config = {
        "sae": 1,
        "metadata": {"model_name": "/home/a/m", "text": {"source": "/home/a/t.txt", "split": "x"}, "n": 2},
    }
    assert public_config(config) == {
        "sae": 1,
        "metadata": {"model_name": "m", "text": {"source": "t.txt", "split": "x"}, "n": 2},
    }


def test_hub_names_are_in_the_front_matter(finished_run: Run, tmp_path: Path) -> None:
    shutil.copytree(finished_run.folder, tmp_path / "run")
    about = (tmp_path / "run" / "run.json").read_text()
    for old, new in (
        (finished_run.config.model.name, "EleutherAI/pythia-70m"),
        (finished_run.config.text.source, "a/t"),
    ):
        about = about.replace(f'"{old}"', f'"{new}"')
    write_sealed(tmp_path / "run" / "run.json", json.loads(about))
    said = front(model_card(open_run(tmp_path / "run"), "user/repo", ["kron"]))
    assert (said["base_model"], said["datasets"]) == ("EleutherAI/pythia-70m", ["a/t"])


SAES: dict[str, MemberConfig] = {
    "topk": ks.topk(d_sae=24, k=3),
    "jumprelu": ks.jumprelu(d_sae=24, k=3),
    "kron, jumprelu": ks.jumprelu(num_heads=4, d_base=2, d_extension=3, k=3),
    "transcoder": ks.topk(d_sae=24, k=3, read="a", write="b", skip=True),
    **{gate: ks.kron(num_heads=4, d_base=2, d_extension=3, k=3, gate=gate) for gate in get_args(GateName)},
}


@pytest.mark.parametrize("name", SAES)
def test_the_plain_code_computes_the_same(name: str) -> None:
    """In float64, to 1e-12; gates that have no short plain form get none."""
    sae: SAE = SAES[name].shape(WIDTH).build(1).double()
    with torch.no_grad():
        for weight in sae.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
        for key, weight in sae.state_dict().items():
            if "threshold" in key:
                weight.fill_(-1.0)
    x = torch.randn(40, WIDTH, dtype=torch.float64)
    code = plain_code(sae.config)
    if name in ("mand_eps", "raw_product", "minimum", "and_ail", "power_mean"):
        assert code is None
        return
    assert code is not None
    found: dict[str, Any] = {"torch": torch, "x": x, "W": sae.state_dict()}
    exec(code, found)
    with torch.no_grad():
        torch.testing.assert_close(found["f"], sae.encode(x).to_dense(), rtol=0, atol=1e-12)
        torch.testing.assert_close(found["x_hat"], sae(x), rtol=0, atol=1e-12)
    assert bool(found["f"].any())
