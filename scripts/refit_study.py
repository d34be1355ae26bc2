"""Compare ways to refit the values of a pursuit; write docs/results/refits.json and a table of docs/research-log.md.

.venv/bin/python scripts/refit_study.py RUN[:SAE,SAE] ... [--tokens 2048] [--result FILE] [--page FILE] [--table-only]

Each RUN is the folder of a run with SAEs of sparsifier TopK; without names, all that were trained without a pursuit.
Every SAE is encoded as it is and with a pursuit of two rounds among 2k candidates. All ways have the same
candidates and first round; what the second takes depends on the refit before it. The library's own way is
`kronsae.core.pursuit.Pursuit`; the others exist only here, on Gram matrices of the candidates' unit rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from study_parts import END, RESULTS, ROOT, made_with, markdown_rows, mean_and_range
from torch import Tensor

from kronsae.core.encoders import KroneckerEncoderConfig
from kronsae.core.metrics import explained_variance, explained_variance_per_token
from kronsae.core.pursuit import Pursuit
from kronsae.core.sae import SAE
from kronsae.kernels import Choice
from kronsae.measures.latent_sample import pick_saes
from kronsae.runs.loaded import LoadedRun
from kronsae.runs.run import open_run
from kronsae.support.files import read_json, write_json, write_marked
from kronsae.support.provenance import provenance
from kronsae.support.terminal import say

RESULT = RESULTS / "refits.json"
PAGE = ROOT / "docs" / "research-log.md"
START = "<!-- results:refits -->"
KEY = "explained_variance_per_token"
SLACK = 1e-4
CHUNK = 128
"""Tokens at a time: their Gram matrices stay small."""


class Problem(NamedTuple):
    """The least squares problem of a token, in the coordinates of unit rows: values y, ``|x - sum_c y_c u_c|^2``."""

    products_BC: Tensor
    """``<u_c, x - b_dec>``."""
    gram_BCC: Tensor

    def gradient(self, y_BC: Tensor) -> Tensor:
        """Return ``<u_c, e>`` with the residual e of these values."""
        return self.products_BC - torch.einsum("bce,be->bc", self.gram_BCC, y_BC)


Refit = Callable[[Problem, Tensor, Tensor, int], Tensor]
"""From the problem, the values, which are chosen, and the number of the round to values."""


def steps_of(size: float, *counts: int) -> Refit:
    """Return projected gradient steps of one size, so many after each round."""

    def refit(problem: Problem, y_BC: Tensor, chosen_BC: Tensor, number: int) -> Tensor:
        for _ in range(counts[number]):
            grad_BC = problem.gradient(y_BC)
            y_BC = torch.where(chosen_BC, (y_BC + size * grad_BC).relu(), 0.0)
        return y_BC

    return refit


def sweeps(*counts: int) -> Refit:
    """Return sweeps of coordinate descent, so many after each round: one value after another becomes its best."""

    def refit(problem: Problem, y_BC: Tensor, chosen_BC: Tensor, number: int) -> Tensor:
        y_BC = y_BC.clone()
        for _ in range(counts[number]):
            for c in range(y_BC.shape[1]):
                grad_B = problem.products_BC[:, c] - (problem.gram_BCC[:, c] * y_BC).sum(1)
                y_BC[:, c] = torch.where(chosen_BC[:, c], (y_BC[:, c] + grad_B).relu(), 0.0)
        return y_BC

    return refit


WAYS: dict[str, Refit | Pursuit] = {
    "as encoded": Pursuit(rounds=1, refit=0),
    "no refit": Pursuit(refit=0),
    "steps of size 0.4, two a round": steps_of(0.4, 2, 2),
    "steps of size 0.5, two a round": steps_of(0.5, 2, 2),
    "steps of size 0.6, two a round": steps_of(0.6, 2, 2),
    "steps of size 0.7, two a round": steps_of(0.7, 2, 2),
    "coordinate descent, one sweep a round": sweeps(1, 1),
    "coordinate descent, one sweep, then two": sweeps(1, 2),
    "conjugate gradients, one step, then two (the library's)": Pursuit(),
    "conjugate gradients, one step, then three": Pursuit(refit=3),
    "conjugate gradients, one step, then eight": Pursuit(refit=8),
}


def encoded(sae: SAE, x_BD: Tensor, way: Refit | Pursuit) -> Tensor:
    """Return the reconstruction of one way."""
    if isinstance(way, Pursuit):
        return sae.decode(sae.encode(x_BD, way))
    k = sae.sparsifier.config.k
    candidates = sae.encoder(x_BD).choose(Choice(2 * k))[0]
    rows_BCD = sae.W_dec[candidates.indices]
    norms_BC = rows_BCD.norm(dim=2)
    units_BCD = rows_BCD / norms_BC.unsqueeze(2).clamp_min(torch.finfo(norms_BC.dtype).tiny)
    target_BD = x_BD - sae.b_dec
    problem = Problem(torch.einsum("bd,bcd->bc", target_BD, units_BCD), units_BCD @ units_BCD.mT)
    y_BC, worth_BC = torch.zeros_like(norms_BC), candidates.values
    left_BC = candidates.values > 0
    for number, size in enumerate(Pursuit().sizes(k)):
        if number > 0:
            worth_BC = problem.gradient(y_BC)
        worth_BC = torch.where(left_BC, worth_BC, 0.0)
        new_BC = torch.zeros_like(left_BC).scatter_(1, worth_BC.topk(size, dim=1).indices, True) & (worth_BC > 0)
        y_BC = torch.where(new_BC, candidates.values * norms_BC if number == 0 else Pursuit().start * worth_BC, y_BC)
        left_BC &= ~new_BC
        y_BC = way(problem, y_BC, (candidates.values > 0) & ~left_BC, number)
    return torch.einsum("bc,bcd->bd", y_BC, units_BCD) + sae.b_dec


def label(sae: SAE) -> str:
    """Return the SAE's kind, and its shape of heads."""
    encoder = sae.config.encoder
    if isinstance(encoder, KroneckerEncoderConfig):
        return f"KronSAE ({encoder.d_base}, {encoder.d_extension})"
    return "TopK"


@torch.no_grad()
def measure(run: str, tokens: int) -> list[dict[str, Any]]:
    """Return a row for each way and each SAE of a run that was trained without a pursuit."""
    folder, _, names = run.partition(":")
    loaded = LoadedRun(open_run(Path(folder)))
    config = loaded.run.config
    x_BD = loaded.run.activations(tokens)
    mean_D = x_BD.double().mean(0)
    rows = []
    for sae in pick_saes(loaded, names.split(",") if names else []).values():
        if sae.pursuit is not None or sae.config.sparsifier.kind != "topk":
            continue
        about = {"model": config.model.name, "seed": config.seed, "sae": label(sae), "d_sae": sae.d_sae}
        before_B = None
        for way, how in WAYS.items():
            x_hat_BD = torch.cat([encoded(sae, part_BD, how) for part_BD in x_BD.split(CHUNK)])
            ev_B = explained_variance_per_token(x_BD, x_hat_BD, mean_D)
            before_B = ev_B if before_B is None else before_B
            worse = float((1 - ev_B > (1 - before_B) * (1 + SLACK)).double().mean())
            row = about | {"k": sae.sparsifier.config.k, "way": way, "tokens": len(x_BD), "tokens_worse": worse}
            row |= {"explained_variance": explained_variance(x_BD, x_hat_BD)}
            rows.append(row | {"explained_variance_per_token": float(ev_B.mean())})
            say(f"{about['model']}, seed {config.seed}, {label(sae)}, {way}: {float(ev_B.mean()):.4f}")
    return rows


def markdown(kept: dict[str, Any]) -> str:
    """Return a table of the gain over the encoder's codes, with a column for every model and SAE."""
    rows = kept["rows"]
    subjects = dict.fromkeys((row["model"], row["sae"]) for row in rows)

    def of(way: str, subject: tuple[str, str]) -> list[dict[str, Any]]:
        found = [row for row in rows if row["way"] == way and (row["model"], row["sae"]) == subject]
        return sorted(found, key=lambda row: row["seed"])

    lines = []
    for way in WAYS:
        cells = [way]
        for subject in subjects:
            own, plain = of(way, subject), of("as encoded", subject)
            if way == "as encoded":
                cells.append(mean_and_range([row[KEY] for row in plain], "{:.4f}"))
                continue
            gains = [one[KEY] - other[KEY] for one, other in zip(own, plain, strict=True)]
            worse = max(row["tokens_worse"] for row in own)
            share = f"{worse:.1%}" if worse >= 5e-4 else "less than 0.1%"
            cells.append(mean_and_range(gains, "{:+.4f}") + (f", {share} of tokens worse" if worse else ""))
        lines.append(cells)
    seeds, tokens = ({row[key] for row in rows} for key in ("seed", "tokens"))
    about = kept["provenance"]
    return "\n".join(
        [
            *markdown_rows(["refit", *(f"{sae}, {model}" for model, sae in subjects)], lines),
            "",
            f"EV per token and, for the pursuits, its gain: mean over {len(seeds)} seed(s), range in brackets; the "
            "largest share, of all seeds, of tokens reconstructed worse than without a pursuit; "
            f"{min(tokens):,} held-out tokens, d_sae = {rows[0]['d_sae']:,}, k = {rows[0]['k']}. "
            + made_with(about, RESULT, "results"),
        ]
    )


def main() -> None:
    """Measure the runs that are given, or only write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="folders, each with the names of its SAEs after a colon, if not all")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--table-only", action="store_true", help="only write the table from the result file")
    asked = parser.parse_args()
    if not asked.table_only:
        rows = [row for run in asked.runs for row in measure(run, asked.tokens)]
        write_json(asked.result, {"provenance": provenance(), "rows": rows})
    write_marked(asked.page, START, END, markdown(read_json(asked.result, "result")))


if __name__ == "__main__":
    main()
