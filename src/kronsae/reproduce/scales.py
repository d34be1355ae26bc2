"""Scales of the studies: which model, text, widths, budgets and sparsities they use."""

from __future__ import annotations

from dataclasses import dataclass

from kronsae.runs.recipes import SMOLLM2_LR, short_run_lr
from kronsae.support.errors import UserError, nearest


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of all studies of one scale.

    Args:
        name: name on the command line.
        about: what it needs, in one line.
        model, model_dtype, text, subset: the language model and its text.
        layers: hooks from early to late; the middle one is that of every study but ``layers``.
        harvested: train on activations that are written to disk once and shared by all studies.
        tokens: training tokens per SAE.
        batch_tokens, context_length, model_batch: as in `kronsae.RunConfig`.
        d_sae: latents of every study but ``budgets``.
        wide: latents of ``budgets``.
        k: active latents per token.
        l0s: active latents per token of ``sparsity``.
        l0s_of_absorption: those of ``absorption``.
        lr: peak learning rate of TopK and KronSAE; None: `kronsae.runs.recipes.short_run_lr`.
        rates: multiples of ``lr`` among which the studies that tune choose, for each SAE, with the first seed.
        eval_tokens, eval_ce_tokens: as in `kronsae.RunConfig`.
        dead_after_tokens: tokens without activation after which a latent counts as dead in training.
        prompts: prompts of the first-letter task.
    """

    name: str
    about: str
    model: str
    text: str
    layers: tuple[str, ...]
    harvested: bool
    tokens: int
    d_sae: int
    wide: tuple[int, ...]
    model_dtype: str = "float32"
    subset: str | None = None
    batch_tokens: int = 2048
    context_length: int = 128
    model_batch: int = 8
    k: int = 32
    l0s: tuple[int, ...] = (16, 32, 64, 128)
    l0s_of_absorption: tuple[int, ...] = (16, 32, 64)
    lr: float | None = None
    rates: tuple[float, ...] = (1.0, 0.5, 2.0)
    eval_tokens: int = 16_384
    eval_ce_tokens: int = 2048
    dead_after_tokens: int = 150_000
    prompts: int = 10_000

    @property
    def hook(self) -> str:
        """Return the middle layer."""
        return self.layers[len(self.layers) // 2]

    def peak_lr(self, d_sae: int) -> float:
        """Return the peak learning rate for a number of latents."""
        return short_run_lr(d_sae) if self.lr is None else self.lr


SCALES: dict[str, Scale] = {
    scale.name: scale
    for scale in (
        Scale(
            name="bundled",
            about="the bundled model on Python's library: no download, each study takes minutes on two cores",
            model="bundled",
            text="bundled",
            layers=("layers.1", "layers.3", "layers.5"),
            harvested=False,
            tokens=300_000,
            d_sae=2048,
            wide=(2048, 8192),
            context_length=256,
            model_batch=32,
        ),
        Scale(
            name="laptop",
            about="SmolLM2-135M on English text: two cores and 6 GB, all studies in one night",
            model="smollm2",
            text="Salesforce/wikitext",
            subset="wikitext-2-raw-v1",
            layers=("layers.8", "layers.15", "layers.22"),
            harvested=True,
            tokens=250_000,
            d_sae=4096,
            wide=(8192, 32_768),
            lr=SMOLLM2_LR,
            rates=(1.0, 0.5, 1.5),
            eval_tokens=8192,
            eval_ce_tokens=1024,
            prompts=8000,
        ),
        Scale(
            name="gpu",
            about="SmolLM2-135M on one GPU: each study takes minutes",
            model="smollm2",
            text="HuggingFaceFW/fineweb-edu",
            subset="sample-10BT",
            layers=("layers.8", "layers.15", "layers.22"),
            harvested=True,
            tokens=20_000_000,
            batch_tokens=8192,
            context_length=512,
            model_batch=64,
            d_sae=32_768,
            wide=(32_768, 131_072),
            k=50,
            l0s=(16, 32, 64, 128, 256),
            lr=2e-3,
            eval_tokens=262_144,
            eval_ce_tokens=32_768,
            dead_after_tokens=2_000_000,
        ),
        Scale(
            name="paper",
            about="the paper's: Qwen2.5-1.5B and 125M tokens of FineWeb-Edu; days on one GPU",
            model="Qwen/Qwen2.5-1.5B",
            model_dtype="bfloat16",
            text="HuggingFaceFW/fineweb-edu",
            subset="sample-10BT",
            layers=("layers.7", "layers.14", "layers.21"),
            harvested=False,
            tokens=125_000_000,
            batch_tokens=8192,
            context_length=1024,
            model_batch=32,
            d_sae=32_768,
            wide=(32_768, 65_536, 131_072),
            k=50,
            l0s=(16, 32, 64, 128, 256),
            l0s_of_absorption=(16, 32, 64, 128, 256),
            lr=8e-4,
            eval_tokens=1_000_000,
            eval_ce_tokens=65_536,
            dead_after_tokens=10_000_000,
        ),
    )
}


def named_scale(name: str) -> Scale:
    """Return the scale with a name.

    Raises:
        UserError: there is none.
    """
    if name not in SCALES:
        raise UserError(f"--scale must be one of {', '.join(SCALES)}; got '{name}'.{nearest(name, SCALES)}")
    return SCALES[name]
