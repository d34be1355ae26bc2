"""Read an SAE in SAELens' format, and say what limits its reconstruction: values, ranking, recall or dictionary.

python examples/explain_sae_lens_errors.py [FOLDER]

FOLDER holds a TopK SAE that SAELens saved for layer 3 of the bundled model. Without it, a TopK SAE is trained and
written in SAELens' format first.
"""

import sys
from pathlib import Path

import kronsae as ks
from kronsae.eval.ladder import ladder
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
    saes=[ks.topk(d_sae=512, k=16)],
    out="topk_run",
    show_progress=False,
)
folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("topk_in_sae_lens")
if not folder.exists():
    export_run(run, "saelens", folder)

found = formats.read(folder)
print(f"a '{found.architecture}' SAE of {found.model} at {found.hook_read}")
climbed = ladder(found.sae, [run.activations(256)])
print(f"explained variance {climbed.encoded:.3f} of 1 at k={climbed.k}; lost by")
for part, lost in climbed.lost_by.items():
    print(f"  {part}: {lost:.3f}")
