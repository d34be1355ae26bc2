"""Train a KronSAE, export it, and open it in SAELens (pip install sae-lens).

python examples/open_in_sae_lens.py

Without sae-lens, kronsae reads the exported folder back.
"""

import importlib.util
from pathlib import Path

import torch

import kronsae as ks
from kronsae.interop import formats
from kronsae.publishing.export import export_run

run = ks.train(
    model="bundled",
    text="bundled",
    hook="layers.3",
    tokens=16_384,
    batch_tokens=1024,
    buffer_tokens=8192,
    eval_tokens=1024,
    saes=[ks.kron(num_heads=64, d_base=2, d_extension=4, k=16)],
    out="kron_run",
    show_progress=False,
)
folder = Path("kron_in_sae_lens")
export_run(run, "saelens", folder)  # the same as: kronsae export kron_run --to saelens --out kron_in_sae_lens

sae = run.load("kron")
x = run.activations(256)
with torch.no_grad():
    latents = sae.encode(x).to_dense()
    if importlib.util.find_spec("sae_lens") is not None:
        from sae_lens import SAE

        import kronsae.interop.saelens  # noqa: F401 (SAELens knows the architectures of kronsae only after this)

        opened = SAE.load_from_disk(folder)
        print(f"SAELens opened {type(opened).__name__}, {opened.cfg.metadata.hook_name}")
        theirs = opened.encode(x)
    else:
        print("sae-lens is not installed, so kronsae reads the folder: pip install sae-lens")
        theirs = formats.read(folder).sae.encode(x).to_dense()
print(f"{latents.count_nonzero() / len(x):.1f} active latents per token")
print(f"largest difference of a latent: {(latents - theirs).abs().max():.1e}")
