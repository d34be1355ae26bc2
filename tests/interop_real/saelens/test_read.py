"""We read what sae-lens saves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sae_lens
import torch
from sae_lens.loading import pretrained_sae_loaders
from tests.interop_real.saelens.lens import D_IN, TOLERANCE, difference, inputs, randomize, read_back

from kronsae.interop import formats

D_SAE = 40
ON = {"apply_b_dec_to_input": True}
OFF = {"apply_b_dec_to_input": False}
CASES: dict[str, list[dict[str, Any]]] = {
    "standard": [ON, OFF],
    "topk": [ON | {"k": 7}, OFF | {"k": 7, "rescale_acts_by_decoder_norm": True}],
    "jumprelu": [ON, OFF],
    "gated": [ON, OFF],
    "transcoder": [OFF | {"d_out": 10}],
    "skip_transcoder": [OFF | {"d_out": 10}],
    "jumprelu_transcoder": [OFF | {"d_out": 10}],
    "jumprelu_skip_transcoder": [OFF | {"d_out": 10}],
}


@pytest.mark.parametrize("architecture", CASES)
def test_an_sae_that_sae_lens_saved_is_read(architecture: str, tmp_path: Path, record: Callable[..., None]) -> None:
    found = []
    for number, settings in enumerate(CASES[architecture]):
        sae_class, config_class = sae_lens.registry.get_sae_class(architecture)
        theirs = sae_class(config_class(d_in=D_IN, d_sae=D_SAE, **settings))
        randomize(theirs, seed=number)
        found.append(difference(read_back(theirs, tmp_path / str(number)), theirs, inputs()))
    assert max(found) <= TOLERANCE
    record(
        "latents and reconstruction of a saved SAE",
        format=f"SAELens {architecture}",
        direction="read",
        package="sae-lens",
        difference=max(found),
        tolerance=TOLERANCE,
    )


def test_a_folder_of_gemma_scope_is_read_as_sae_lens_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: Callable[..., None]
) -> None:
    name = "layer_3/width_16k/average_l0_50"
    folder = tmp_path / "gemma-scope-2b-pt-res" / name
    folder.mkdir(parents=True)
    shapes = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    draw = np.random.default_rng(0)
    arrays: dict[str, Any] = {key: draw.standard_normal(shape, dtype=np.float32) for key, shape in shapes.items()}
    arrays["threshold"] = draw.random(D_SAE, dtype=np.float32)
    np.savez(folder / "params.npz", **arrays)
    monkeypatch.setattr(pretrained_sae_loaders, "hf_hub_download", lambda **asked: folder / asked["filename"])
    about, state, _ = pretrained_sae_loaders.gemma_2_sae_huggingface_loader("google/gemma-scope-2b-pt-res", name)
    sae_class, config_class = sae_lens.registry.get_sae_class(about["architecture"])
    theirs = sae_class(config_class(d_in=D_IN, d_sae=D_SAE, apply_b_dec_to_input=about["apply_b_dec_to_input"]))
    theirs.load_state_dict(state)
    ours = formats.read(folder)
    assert ours.hook_read == about["hook_name"]
    found = difference(ours.sae, theirs, inputs())
    assert found <= TOLERANCE
    record(
        "latents and reconstruction of an SAE that sae-lens loads",
        format="Gemma Scope",
        direction="read",
        package="sae-lens",
        difference=found,
        tolerance=TOLERANCE,
    )


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka_batchtopk", "standard", "jumprelu", "gated"])
def test_an_sae_that_sae_lens_trained_is_read_finished_and_as_checkpoint(
    architecture: str, tmp_path: Path, record: Callable[..., None]
) -> None:
    sae_class, config_class = sae_lens.registry.get_sae_training_class(architecture)
    own: dict[str, Any] = {"k": 6} if "topk" in architecture else {}
    if "matryoshka" in architecture:
        own["matryoshka_widths"] = [10, D_SAE]
    theirs = sae_class(config_class(d_in=D_IN, d_sae=D_SAE, **own))
    randomize(theirs)
    optimizer = torch.optim.Adam(theirs.parameters(), lr=1e-3)
    for step in range(30):
        step_input = sae_lens.saes.sae.TrainStepInput(
            sae_in=torch.randn(64, D_IN, generator=torch.Generator().manual_seed(step)),
            coefficients={name: float(getattr(one, "value", one)) for name, one in theirs.get_coefficients().items()},
            dead_neuron_mask=None,
            n_training_steps=step,
            is_logging_step=False,
        )
        theirs.training_forward_pass(step_input).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    theirs.save_inference_model(tmp_path / "finished")
    finished = sae_lens.SAE.load_from_disk(tmp_path / "finished")
    largest = difference(formats.read(tmp_path / "finished").sae, finished, inputs())
    largest = max(largest, difference(read_back(theirs, tmp_path / "checkpoint"), finished, inputs()))
    assert largest <= TOLERANCE
    record(
        "an SAE trained by SAELens: finished, and its checkpoint",
        format=f"SAELens {architecture}",
        direction="read",
        package="sae-lens",
        difference=largest,
        tolerance=TOLERANCE,
    )
