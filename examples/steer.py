"""Steer the bundled model: find the KronSAE latent that is most active on some texts, and add it to other texts.

python examples/steer.py
"""

import torch

import kronsae as ks
from kronsae.data.model import ModelConfig, load_model
from kronsae.interventions.intervene import Intervention, steer
from kronsae.interventions.steering import continuations

HOOK = "layers.3"
IMPORTS = ["import os", "import sys", "from pathlib import Path", "from typing import Any", "import numpy as np"]
OTHERS = ["def main(self):", "return value + 1", "for line in lines:", "x = [1, 2, 3]", "if not found:"]
PROMPTS = ["def read(path):\n    ", "class Reader:\n    ", "# The main program\n"]

run = ks.train(
    model="bundled",
    text="bundled",
    hook=HOOK,
    tokens=65_536,
    batch_tokens=1024,
    buffer_tokens=16_384,
    saes=[ks.kron(num_heads=64, d_base=2, d_extension=4, k=16, lr=4e-3)],
    out="runs/steer",
    show_progress=False,
)
language_model = load_model(ModelConfig(name="bundled"))
sae = run.load("kron").to(language_model.device)


@torch.no_grad()
def mean_latents(texts):
    """Return the mean activation of each latent over the tokens of texts."""
    total, tokens = torch.zeros(sae.d_sae, device=language_model.device), 0
    for text in texts:
        ids = torch.tensor([language_model.tokenizer(text)["input_ids"]], device=language_model.device)
        with ks.attach(language_model.model, sae, HOOK) as attached:
            language_model.model(ids)
        latents = attached.codes.to_dense()[0, 1:]  # the first token has unusual activations
        total, tokens = total + latents.sum(0), tokens + len(latents)
    return total / tokens


latent = int((mean_latents(IMPORTS) - mean_latents(OTHERS)).argmax())
head, cell = divmod(latent, sae.encoder.d_base * sae.encoder.d_extension)
base, extension = divmod(cell, sae.encoder.d_extension)
print(f"latent {latent}: AND of base {base} and extension {extension} of head {head}")

# Add half of the activations' mean norm in the latent's direction, at every token but the first.
amount = 0.5 * float(run.activations(500).norm(dim=1).mean() / sae.W_dec[latent].detach().norm().cpu())
steered = Intervention(sae=sae, hook=HOOK, changes=[steer(latent, amount)], positions=slice(1, None))
for one in continuations(language_model, PROMPTS, steered, new_tokens=16):
    print(f"{one.prompt!r}\n    plain:   {one.plain!r}\n    steered: {one.changed!r}")
