"""What a study works with: a scale, seeds, a folder, and functions that train and open runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kronsae.data.manifest import read_manifest
from kronsae.data.model import ModelConfig
from kronsae.data.places import open_place
from kronsae.data.text import TextConfig
from kronsae.reproduce.claims import Row
from kronsae.reproduce.scales import Scale
from kronsae.reproduce.tables import EXPLAINED
from kronsae.runs.harvest import harvest
from kronsae.runs.run import Run
from kronsae.support.config import to_dict
from kronsae.support.errors import UserError
from kronsae.support.files import write_json
from kronsae.support.progress import progress_bar
from kronsae.sweeps.grid import SweepConfig
from kronsae.sweeps.sweep import execute_sweep

RATE = ".lr"
"""Between the name of an SAE and its multiple of the learning rate, while the best one is sought."""
HARVESTED = 2
"""How many times the scale's tokens are harvested."""
TRAINED, ACTIVATIONS, BASE = "trained", "activations", "base.json"
FIGURES = (
    *("name", "seed", "architecture", "gate", "num_heads", "d_base", "d_extension", "k", "lr", "d_sae"),
    *(
        "parameters",
        "encoder_parameters",
        "tokens",
        "training_flops",
        "explained_variance",
        "explained_variance_per_token",
        "l0",
        "dead_share",
    ),
    *("ce_recovered", "kl_recovered", "seconds", "evaluation_tokens", "commit", "group", "name_in_group", "diverged"),
)
"""Columns of a sweep's rows that a study keeps."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """Scale, seeds and folder of the studies.

    Args:
        scale: sizes.
        folder: folder of the scale: the trained SAEs and harvested activations that its studies share.
        seeds: seeds of the SAEs and of the order of the data.
        quiet: show no live displays.
        say: receives status messages.
    """

    scale: Scale
    folder: Path
    seeds: tuple[int, ...]
    quiet: bool = False
    say: Callable[[str], None] = lambda line: None

    def sae(self, kind: str, *, d_sae: int | None = None, **options: Any) -> str:
        """Return the specification of an SAE of this scale, as for ``--sae``; options override the scale's.

        Without a shape, ``kron`` has M = 2 and N = 4.
        """
        size = self.scale.d_sae if d_sae is None else d_sae
        words: dict[str, Any] = {"d_sae": size, "k": self.scale.k, "lr": self.scale.peak_lr(size)}
        words["dead_after_tokens"] = self.scale.dead_after_tokens
        if kind.startswith("kron") or kind.endswith("kron"):
            words |= {"d_base": 2, "d_extension": 4}
        if kind.startswith("matryoshka"):
            words["smallest"] = size // 8
        return " ".join([kind, *(f"{name}={value}" for name, value in (words | options).items())])

    def train(
        self,
        saes: Sequence[str],
        *,
        hook: str | None = None,
        tokens: int | None = None,
        same_flops_as: str | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[Row]:
        """Train and evaluate SAEs, or find them trained; return `FIGURES` of each SAE and seed that did not diverge.

        Args:
            saes: specifications, see `sae`; ``{a,b}`` stands for each value in turn.
            hook: default: the scale's middle layer.
            tokens: default: the scale's.
            same_flops_as: name of the SAE that trains on ``tokens``; every other SAE gets the same FLOPs.
            seeds: default: all of the study.
        """
        scale = self.scale
        config = SweepConfig(
            saes=tuple(saes),
            config=str(self._base(hook or scale.hook)),
            activations=str(self.activations()) if scale.harvested else None,
            hook=hook or scale.hook,
            tokens=(tokens or scale.tokens,),
            same_flops_as=same_flops_as,
            seeds=tuple(self.seeds if seeds is None else seeds),
        )
        found = execute_sweep(config, self.folder / TRAINED, show_progress=not self.quiet, say=self.say)
        for row in found.rows:
            if row["diverged"]:
                self.say(f"Warning: {row['diverged']}")
        return [{key: row.get(key) for key in FIGURES} for row in found.rows if not row["diverged"]]

    def train_tuned(self, saes: Mapping[str, Callable[[float], str]], **options: Any) -> list[Row]:
        """Train SAEs, each at the learning rate that is best for it; return the rows of `train`.

        With the first seed, each SAE is trained at every rate of the scale; the rate with the largest explained
        variance (`EXPLAINED`) is used for the other seeds.

        Args:
            saes: by name, a function from the multiple of the scale's learning rate to the specification.
            options: as for `train`.
        """
        first, *others = self.seeds
        specs = [f"{spec(rate)} name={name}{RATE}{rate:g}" for name, spec in saes.items() for rate in self.scale.rates]
        tried = self.train(specs, seeds=(first,), **options)
        best = {}
        for name in saes:
            own = [row for row in tried if row["name"].rpartition(RATE)[0] == name]
            best[name] = max(own, key=lambda row: float(row[EXPLAINED]))
        chosen = [
            f"{saes[name](float(row['name'].rpartition(RATE)[2]))} name={row['name']}" for name, row in best.items()
        ]
        rest = self.train(chosen, seeds=others, **options) if others else []
        rows = [*best.values(), *rest]
        return [
            {**row, "name": row["name"].rpartition(RATE)[0], "rate": row["name"].rpartition(RATE)[2]} for row in rows
        ]

    def runs(self, rows: Iterable[Row]) -> Iterator[tuple[Run, dict[str, Row]]]:
        """Yield the run folders of trained rows, each with its rows by the SAE's name in that run."""
        by_group: dict[str, dict[str, Row]] = {}
        for row in rows:
            by_group.setdefault(row["group"], {})[row["name_in_group"]] = row
        for group, saes in by_group.items():
            yield Run(self.folder / TRAINED / "groups" / group), saes

    def activations(self) -> Path:
        """Return the folder of harvested activations of all layers; harvest them the first time.

        They are twice the scale's tokens: SAEs of equal FLOPs train longer, and batches are drawn from all of them.

        Raises:
            UserError: the folder holds another number of tokens.
        """
        folder, scale = self.folder / ACTIVATIONS, self.scale
        tokens = HARVESTED * scale.tokens
        if not (folder / "manifest.json").exists():
            self.say(f"Harvesting {tokens:,} tokens at {', '.join(scale.layers)} of {scale.model}.")
            with progress_bar("harvesting", quiet=self.quiet) as progress:
                harvest(
                    model=ModelConfig(name=scale.model, dtype=scale.model_dtype),
                    text=TextConfig(source=scale.text, subset=scale.subset),
                    hook=[scale.hook, *(layer for layer in scale.layers if layer != scale.hook)],
                    tokens=tokens,
                    out=folder,
                    dtype="bfloat16",
                    context_length=scale.context_length,
                    model_batch=scale.model_batch,
                    progress=progress,
                )
        if (held := read_manifest(open_place(folder)).tokens) != tokens:
            raise UserError(
                f"'{folder}' must hold {tokens:,} tokens for this scale; it holds {held:,}. Remove it, or give another "
                "--out."
            )
        return folder

    def _base(self, hook: str) -> Path:
        """Write the config that all runs start from; return its path. Every sweep replaces its SAEs and budget."""
        from dataclasses import replace

        from kronsae.runs import recipes

        scale = self.scale
        quickstart = recipes.quickstart()
        loop = replace(quickstart.loop, tokens=scale.tokens, batch_tokens=scale.batch_tokens, log_every=20)
        base = replace(
            quickstart,
            model=ModelConfig(name=scale.model, dtype=scale.model_dtype),
            text=TextConfig(source=scale.text, subset=scale.subset),
            hook=hook,
            loop=replace(loop, checkpoint_every=100),
            context_length=scale.context_length,
            model_batch=scale.model_batch,
            buffer_tokens=max(2**16, 8 * scale.batch_tokens),
            eval_tokens=scale.eval_tokens,
            eval_ce_tokens=scale.eval_ce_tokens,
        )
        path = self.folder / BASE
        write_json(path, to_dict(base))
        return path
