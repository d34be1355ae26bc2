"""Compare encoders, and ways to choose and value codes with the dictionary, on equal activations; one cell each.

    python scripts/pursuit_ideas.py run [--seeds 1] [--only NAME ...]  # trains missing cells
    python scripts/pursuit_ideas.py table  # writes pursuit_ideas.json and the research log's table

Sizes and learning rate are those of `research_results`; the training is shorter and the corpus is today's, so the base
is measured again.
Ideas that are not part of the library are implemented only here and in `encoder_ideas`, in plain PyTorch.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from encoder_ideas import SecondPass, TrunkConfig, WhitenedConfig, exclusive_grids, whiten
from research_results import BASE, BATCH, D_SAE, HOOK, K, activations
from study_parts import RESULTS, ROOT, markdown_rows
from torch import Tensor, nn

import kronsae.core.objective
import kronsae.core.sae
from kronsae import kernels
from kronsae.core.codes import SparseCodes
from kronsae.core.decoders import Decoder
from kronsae.core.encoders import Encoder, EncoderConfig, Latents
from kronsae.core.losses import SquaredErrorConfig, squared_error
from kronsae.core.metrics import explained_variance
from kronsae.core.normalization import Normalization
from kronsae.core.pursuit import Pursuit, PursuitLearning, choose_and_pursue, pursue
from kronsae.core.sae import SAE
from kronsae.kernels import Choice
from kronsae.runs.recipes import kron, topk
from kronsae.support.files import write_json, write_marked
from kronsae.support.provenance import provenance
from kronsae.support.terminal import say
from kronsae.training.member import Member

RESULT = RESULTS / "pursuit_ideas.json"
PAGE = ROOT / "docs" / "research-log.md"
START, END = "<!-- results:pursuit-ideas -->", "<!-- /results:pursuit-ideas -->"
PLAIN, KRON, HALF, OTHER = "TopK", "KronSAE (2, 4)", "KronSAE (4, 4)", "KronSAE"
SIDES: dict[str, dict[str, int]] = {
    PLAIN: {},
    KRON: {"d_base": 2, "d_extension": 4},
    HALF: {"d_base": 4, "d_extension": 4},
    OTHER: {},  # the idea gives its shape
}
ALL = (PLAIN, KRON, HALF)
STEPS, HELD_OUT_TOKENS = 200, 16_384
FIRST_SHARE = 0.3  # of eta in `Disposal`


def products(residual_BD: Tensor, W_dec_FD: Tensor, latents_BR: Tensor) -> Tensor:
    """Return ``<d_f, residual>`` for the latents of each token, differentiable in both."""
    found_BR = kernels.sampled_products(residual_BD.detach(), W_dec_FD.detach(), latents_BR)
    return kernels.linear_at(residual_BD, W_dec_FD, W_dec_FD.new_zeros(len(W_dec_FD)), latents_BR, found_BR)


class Disposal(nn.Module):
    """One-shot disposal with learned ``eta_f`` and ``t_f``; rows of the decoder have unit norm.

    Of the encoder's ``candidates * k`` best candidates with values z, x_hat decodes the k best; then
    ``l_f = <d_f, x - x_hat> + z_f [f among the k best]``, and ``relu((1 - eta_f) z_f + eta_f l_f - t_f)`` are the
    values, of which the k largest are kept.

    Args:
        d_sae: number of latents.
        candidates: candidates as a multiple of k.
        steps: gradient steps of size 0.5 on the values kept.
        detached: no gradient passes through x_hat.
    """

    changes_nothing = False

    def __init__(self, d_sae: int, candidates: int = 2, steps: int = 0, detached: bool = False) -> None:
        super().__init__()
        self.eta_F = nn.Parameter(torch.full((d_sae,), FIRST_SHARE))
        self.threshold_F = nn.Parameter(torch.zeros(d_sae))
        self.candidates, self.steps, self.detached = candidates, steps, detached

    def codes(self, x_BD: Tensor, proposed: SparseCodes, decoder: Decoder, k: int) -> SparseCodes:
        """Return the codes of x, given the encoder's candidates."""
        z_BC, latents_BC = proposed.values, proposed.indices
        best_BK = z_BC.detach().topk(k, dim=1).indices
        among_BC = torch.zeros_like(z_BC).scatter_(1, best_BK, 1.0)
        zero_D = torch.zeros_like(decoder.b_dec)
        target_BD = x_BD - decoder.b_dec
        own_BD = kernels.decode(z_BC.gather(1, best_BK), latents_BC.gather(1, best_BK), decoder.W_dec, zero_D)
        residual_BD = target_BD - (own_BD.detach() if self.detached else own_BD)
        l_BC = products(residual_BD, decoder.W_dec, latents_BC) + z_BC * among_BC
        eta_BC = self.eta_F[latents_BC]
        values_BC = ((1 - eta_BC) * z_BC + eta_BC * l_BC - self.threshold_F[latents_BC]).relu()
        values_BC = values_BC * (z_BC > 0)  # padding
        kept_BK = values_BC.detach().topk(k, dim=1).indices
        values_BK, latents_BK = values_BC.gather(1, kept_BK), latents_BC.gather(1, kept_BK)
        values_BK = refitted(values_BK, latents_BK, target_BD, decoder.W_dec, self.steps)
        return SparseCodes(values_BK, latents_BK, proposed.d_sae)


class Mixed(nn.Module):
    """A pursuit of two rounds in which the encoder has a say in the second, too, and learns from all latents chosen.

    Round 1 takes the k / 2 largest z. With the residual e of these, round 2 takes the k / 2 largest of
    ``(1 - eta) z_f + eta <d_f, e>`` among the other candidates, with these values. Refit steps of size 0.5 follow.

    Args:
        candidates: candidates as a multiple of k.
        steps: refit steps at the end.
        eta: share of the product.
    """

    changes_nothing = False

    def __init__(self, candidates: int = 2, steps: int = 2, eta: float = 0.5) -> None:
        super().__init__()
        self.candidates, self.steps, self.eta = candidates, steps, eta

    def codes(self, x_BD: Tensor, proposed: SparseCodes, decoder: Decoder, k: int) -> SparseCodes:
        """Return the codes of x, given the encoder's candidates."""
        z_BC, latents_BC = proposed.values, proposed.indices
        order_BC = z_BC.detach().argsort(dim=1, descending=True)
        z_BC, latents_BC = z_BC.gather(1, order_BC), latents_BC.gather(1, order_BC)
        first, target_BD = k // 2, x_BD - decoder.b_dec
        zero_D = torch.zeros_like(decoder.b_dec)
        own_BD = kernels.decode(z_BC[:, :first], latents_BC[:, :first], decoder.W_dec, zero_D)
        rest_BC = latents_BC[:, first:]
        worth_BC = (1 - self.eta) * z_BC[:, first:] + self.eta * products(target_BD - own_BD, decoder.W_dec, rest_BC)
        worth_BC = worth_BC.relu() * (z_BC[:, first:] > 0)
        second_BK = worth_BC.detach().topk(k - first, dim=1).indices
        values_BK = torch.cat([z_BC[:, :first], worth_BC.gather(1, second_BK)], dim=1)
        latents_BK = torch.cat([latents_BC[:, :first], rest_BC.gather(1, second_BK)], dim=1)
        return SparseCodes(
            refitted(values_BK, latents_BK, target_BD, decoder.W_dec, self.steps), latents_BK, proposed.d_sae
        )


class TwoLosses(nn.Module):
    """The pursued codes carry no gradient: the dictionary learns from them, the encoder from a loss of its own.

    Args:
        own: weight of the reconstruction error of the encoder's own codes, for which the dictionary is a constant.
        predicted: weight of ``sum_f (z_f - z*_f)^2`` over the candidates, with z* the pursued values, 0 if not chosen.
    """

    candidates, changes_nothing = 2, False

    def __init__(self, own: float = 1.0, predicted: float = 0.0) -> None:
        super().__init__()
        self.own_weight, self.predicted_weight = own, predicted
        self.own: SparseCodes | None = None
        self.gap: Tensor | None = None

    def codes(self, x_BD: Tensor, proposed: SparseCodes, decoder: Decoder, k: int) -> SparseCodes:
        """Return the pursued codes, and keep the encoder's."""
        best_BK = proposed.values.detach().topk(k, dim=1).indices
        values_BK, latents_BK = proposed.values.gather(1, best_BK), proposed.indices.gather(1, best_BK)
        self.own = SparseCodes(values_BK, latents_BK, proposed.d_sae)
        with torch.no_grad():
            found = pursue(Pursuit(), x_BD, proposed, decoder, k)
            wanted_BF = torch.zeros(len(x_BD), proposed.d_sae).scatter_add_(1, found.indices, found.values)
            wanted_BC = wanted_BF.gather(1, proposed.indices)
        self.gap = ((proposed.values - wanted_BC) * (proposed.values > 0)).square().sum(1).mean()
        return found

    def __call__(self, decoder: Decoder, codes: SparseCodes, target_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum of the losses, and the reconstruction from the pursued codes."""
        loss, x_hat_BD = SquaredErrorConfig()(decoder, codes, target_BD)
        assert self.own is not None
        assert self.gap is not None
        if self.own_weight:
            own_BD = kernels.decode(self.own.values, self.own.indices, decoder.W_dec.detach(), decoder.b_dec.detach())
            loss = loss + self.own_weight * squared_error(target_BD, own_BD)
        return loss + self.predicted_weight * self.gap, x_hat_BD


def two_losses(**options: Any) -> Callable[[Member], None]:
    """Return a change that trains with `TwoLosses`."""

    def prepare(member: Member) -> None:
        both = TwoLosses(**options)
        attach(member, both)
        object.__setattr__(member.config, "loss", both)

    return prepare


def refitted(values_BK: Tensor, latents_BK: Tensor, target_BD: Tensor, W_dec_FD: Tensor, steps: int) -> Tensor:
    """Return the values after some gradient steps of size 0.5; those of 0 stay 0."""
    for _ in range(steps):
        left_BD = target_BD - kernels.decode(values_BK, latents_BK, W_dec_FD, torch.zeros_like(target_BD[0]))
        values_BK = (values_BK + 0.5 * products(left_BD, W_dec_FD, latents_BK)).relu() * (values_BK > 0)
    return values_BK


def choose(
    pursuit: Any, x_BD: Tensor, latents: Latents, decoder: Decoder, k: int, *also: Choice
) -> tuple[SparseCodes, ...]:
    """Return what `choose_and_pursue` returns, for a `Disposal` too."""
    if isinstance(pursuit, Pursuit):
        return choose_and_pursue(pursuit, x_BD, latents, decoder, k, *also)
    proposed, *rest = latents.choose(Choice(pursuit.candidates * k), *also)
    return pursuit.codes(x_BD, proposed, decoder, k), *rest


def attach(member: Member, pursuit: Any, learning: PursuitLearning = "unrolled") -> None:
    """Train with a pursuit, or with a module of this script in its place."""
    member.sae.pursuit = pursuit
    object.__setattr__(member.config, "pursuit_learning", learning)


def pursued(pursuit: Pursuit, learning: PursuitLearning = "unrolled") -> Callable[[Member], None]:
    """Return a change that trains with a pursuit."""

    def prepare(member: Member) -> None:
        attach(member, pursuit, learning)

    return prepare


def disposed(**options: Any) -> Callable[[Member], None]:
    """Return a change that trains with a `Disposal`."""

    def prepare(member: Member) -> None:
        disposal = Disposal(member.sae.d_sae, **options)
        attach(member, disposal)
        member.optimizer.add_param_group({"params": list(disposal.parameters())})

    return prepare


def mixed(**options: Any) -> Callable[[Member], None]:
    """Return a change that trains with a `Mixed` pursuit."""

    def prepare(member: Member) -> None:
        attach(member, Mixed(**options))

    return prepare


def second_pass(eta: float) -> Callable[[Member], None]:
    """Return a change that trains with a `SecondPass`."""

    def prepare(member: Member) -> None:
        attach(member, SecondPass(member.sae.encoder, eta))

    return prepare


def trunk(dense: int, num_heads: int, encoder: EncoderConfig) -> TrunkConfig:
    """Return the config of an encoder with dense latents and heads of 4 x 4, initialised as the given one."""
    return TrunkConfig(dense=dense, num_heads=num_heads, d_base=4, d_extension=4, init_norm=encoder.init_norm)


def afterwards(encoder: Encoder) -> dict[str, Any]:
    """Return ways to encode a plainly trained SAE, by name."""
    return {
        "pursued": Pursuit(),
        "pursued, 4k": Pursuit(candidates=4),
        "second pass, 0.5": SecondPass(encoder, 0.5),
        "second pass, 1": SecondPass(encoder, 1.0),
        "second pass, 0.5, pursued": SecondPass(encoder, 0.5, Pursuit()),
        "second pass, 1, pursued": SecondPass(encoder, 1.0, Pursuit()),
    }


def after(share: float, pursuit: Pursuit) -> Callable[[Member, int, int], None]:
    """Return a schedule that starts the pursuit after a share of the steps."""

    def each_step(member: Member, step: int, steps: int) -> None:
        member.sae.pursuit = pursuit if step >= share * steps else None

    return each_step


@dataclass(frozen=True, kw_only=True)
class Idea:
    """A change to the base.

    Args:
        about: description.
        sides: SAEs that it is tried with.
        encoder: changes the config of the encoder.
        prepare: changes the member before its first step.
        fit: changes the member before its first step, given normalised activations.
        dense_share: share of the steps that train a dense SAE, from which ``from_dense`` then starts the member.
        from_dense: changes the member before its first step, given the dense one and normalised activations.
        each_step: called before every step with (member, step, steps).
        lr: learning rate; None: that of `research_results`.
        shape: words of `kron` in place of those of the side.
    """

    about: str
    sides: tuple[str, ...] = (PLAIN, KRON)
    lr: float | None = None
    shape: dict[str, Any] = field(default_factory=dict)
    encoder: Callable[[EncoderConfig], Any] = field(default=lambda encoder: encoder)
    prepare: Callable[[Member], None] = field(default=lambda member: None)
    fit: Callable[[Member, Tensor], None] = field(default=lambda member, x_ND: None)
    dense_share: float = 0.0
    from_dense: Callable[[Member, Member, Tensor], None] = field(default=lambda member, dense, x_ND: None)
    each_step: Callable[[Member, int, int], None] = field(default=lambda member, step, steps: None)


IDEAS: dict[str, Idea] = {
    "base": Idea(about="plain codes", sides=ALL),
    "pursuit": Idea(
        about="2 rounds among 2k candidates, 2 refit steps, unrolled", sides=(KRON,), prepare=pursued(Pursuit())
    ),
    "disposal": Idea(about="one-shot disposal among 2k candidates", prepare=disposed()),
    "disposal, 1 step": Idea(
        about="one-shot disposal among 2k candidates, then 1 refit step", sides=(KRON,), prepare=disposed(steps=1)
    ),
    "disposal, detached": Idea(
        about="one-shot disposal, no gradient through x_hat", sides=(KRON,), prepare=disposed(detached=True)
    ),
    "two losses": Idea(
        about="plain loss, plus the loss of the pursued codes for the dictionary",
        sides=ALL,
        prepare=pursued(Pursuit(), "two_losses"),
    ),
    "two losses, apart": Idea(
        about="plain loss for the encoder alone, loss of the pursued codes for the dictionary alone",
        prepare=two_losses(),
    ),
    "predicted": Idea(
        about="the encoder learns the pursued values of its candidates, the dictionary from the pursued codes",
        sides=(KRON,),
        prepare=two_losses(own=0.0, predicted=1.0),
    ),
    "two losses and predicted": Idea(
        about="both losses for the encoder, apart from the dictionary's",
        sides=(KRON,),
        prepare=two_losses(predicted=1.0),
    ),
    "pursuit, mixed": Idea(
        about="2 rounds; the second ranks and starts with half the encoder's value, half the product; 2 refit steps",
        sides=(KRON,),
        prepare=mixed(),
    ),
    **{
        f"{name}, lr 0.008": Idea(about=about, sides=(KRON,), prepare=prepare, lr=8e-3)
        for name, about, prepare in (
            ("base", "plain codes, another rate", lambda member: None),
            ("pursuit", "unrolled, another rate", pursued(Pursuit())),
            ("disposal, 1 step", "another rate", disposed(steps=1)),
            ("two losses", "another rate", pursued(Pursuit(), "two_losses")),
        )
    },
    "pursuit late": Idea(
        about="unrolled, in the last quarter of the steps only",
        sides=(KRON,),
        prepare=pursued(Pursuit()),
        each_step=after(0.75, Pursuit()),
    ),
    **{
        f"null symbols ({m}, {n})": Idea(
            about=f"heads of {m} x {n} in which base or extension may be absent",
            sides=(OTHER,),
            shape={"num_heads": heads, "d_base": m, "d_extension": n, "null_symbols": True},
        )
        for m, n, heads in ((1, 1, D_SAE // 3), (2, 2, D_SAE // 8))
    },
    **{
        f"trunk {dense}/{D_SAE}": Idea(
            about=f"{dense} latents have rows of their own, the others are cells of {heads} heads of 4 x 4",
            sides=(OTHER,),
            shape={"num_heads": heads, "d_base": 4, "d_extension": 4},
            encoder=partial(trunk, dense, heads),
        )
        for dense, heads in ((256, 112), (512, 96), (1024, 64))
    },
    **{
        name: Idea(
            about="the encoder's weights are learned in whitened coordinates; the same function at the start" + also,
            encoder=lambda encoder: WhitenedConfig(inner=encoder),
            fit=whiten,
            lr=lr,
        )
        for name, also, lr in (("whitened", "", None), ("whitened, lr 0.008", "; another rate", 8e-3))
    },
    **{
        name: Idea(
            about=about,
            sides=(KRON,),
            dense_share=0.25,
            from_dense=partial(exclusive_grids, exclusive=exclusive, likeness=likeness),
        )
        for name, about, exclusive, likeness in (
            (
                "exclusive grids",
                "a quarter of the steps train a dense SAE; heads start from latents seldom active together",
                True,
                0.0,
            ),
            ("exclusive grids, alike", "as above, and of similar rows", True, 5.0),
            ("random grids", "as above, heads from latents at random", False, 0.0),
        )
    },
    **{
        f"second pass, {eta:g}": Idea(
            about=f"the k largest latents of x + {eta:g} e, with e the residual of the first k; unrolled",
            prepare=second_pass(eta),
        )
        for eta in (0.5, 1.0)
    },
}


def build(idea: Idea, side: str, seed: int, steps: int, d_in: int) -> Member:
    """Return the member of one cell."""
    words: dict[str, Any] = {"k": K, **BASE, "dead_after_tokens": 150_000, "seed": seed}
    words |= {} if idea.lr is None else {"lr": idea.lr}
    shape = idea.shape or ({"d_sae": D_SAE} | SIDES[side])
    config = kron(**shape, **words) if "d_base" in shape else topk(**shape, **words)
    return Member(replace(config, encoder=idea.encoder(config.encoder)), d_in, HOOK, steps)


def train(idea: Idea, side: str, seed: int, train_ND: np.ndarray[Any, Any], held_out_ND: Tensor) -> dict[str, Any]:
    """Train one cell and return its scores; ``plain_explained_variance`` is that of the encoder's own codes."""
    started = perf_counter()
    order = np.random.default_rng(seed).permutation(len(train_ND))

    def batch(step: int) -> Tensor:
        return torch.from_numpy(train_ND[np.sort(order[step * BATCH : (step + 1) * BATCH])])

    steps = len(train_ND) // BATCH
    first = round(idea.dense_share * steps)
    member = build(idea, side, seed, steps - first, train_ND.shape[1])
    seen_ND = torch.cat([batch(step) for step in range(16)])
    seen_ND = Normalization.of(seen_ND)(seen_ND)
    if first:
        dense = build(IDEAS["base"], "TopK", seed, first, train_ND.shape[1])
        for step in range(first):
            dense.step(batch(step), step, want_metrics=False)
        idea.from_dense(member, dense, seen_ND)
    idea.prepare(member)
    idea.fit(member, seen_ND)
    for step in range(first, steps):
        idea.each_step(member, step - first, steps - first)
        member.step(batch(step), step - first, want_metrics=False)
    x_ND = member.normalizations["read"](held_out_ND)  # ratios of errors are the same on this scale
    found = score(member.sae, x_ND)
    trained_with = member.sae.pursuit
    member.sae.pursuit = None
    plain = score(member.sae, x_ND)
    post_hoc: dict[str, float] = {}
    if trained_with is None:
        for name, pursuit in afterwards(member.sae.encoder).items():
            member.sae.pursuit = pursuit
            post_hoc[name] = score(member.sae, x_ND)["explained_variance"]
    return {
        **found,
        "plain_explained_variance": plain["explained_variance"],
        "post_hoc": post_hoc,
        "encoder_parameters": sum(parameter.numel() for parameter in member.sae.encoder.parameters()),
        "seconds": perf_counter() - started,
    }


@torch.no_grad()
def score(sae: SAE, x_ND: Tensor) -> dict[str, float]:
    """Return explained variance, l0 and the share of latents that are never active."""
    used_F = torch.zeros(sae.d_sae, dtype=torch.bool)
    x_hat, l0 = [], 0.0
    for x_BD in x_ND.split(4096):
        codes = sae.encode(x_BD)
        used_F[codes.indices[codes.active]] = True
        l0 += float(codes.active.sum()) / len(x_ND)
        x_hat.append(sae.decode(codes))
    return {
        "explained_variance": explained_variance(x_ND, torch.cat(x_hat)),
        "l0": l0,
        "unused_share": 1 - float(used_F.float().mean()),
    }


def measured(folder: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Return the existing results by cell."""
    path = folder / "pursuit.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    return {(row["idea"], row["side"], row["seed"]): row for row in rows}


def run(asked: argparse.Namespace) -> None:
    """Train the cells without results."""
    kronsae.core.objective.choose_and_pursue = kronsae.core.sae.choose_and_pursue = choose  # type: ignore[assignment]
    asked.data.mkdir(parents=True, exist_ok=True)
    train_ND, held_out_ND = activations(asked.data, STEPS, HELD_OUT_TOKENS)
    cells = [(name, side, seed) for seed in range(asked.seeds) for name in asked.only for side in IDEAS[name].sides]
    for name, side, seed in cells:
        if (name, side, seed) in measured(asked.data):
            continue
        row = {"idea": name, "side": side, "seed": seed, **train(IDEAS[name], side, seed, train_ND, held_out_ND)}
        with (asked.data / "pursuit.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        say(f"{name:26s} {side} seed {seed}  EV {row['explained_variance']:.4f}  {row['seconds']:.0f} s")


def table(asked: argparse.Namespace) -> None:
    """Write the result file and the table of the research log."""
    rows = list(measured(asked.data).values())
    if not rows:
        raise SystemExit("nothing is measured yet: python scripts/pursuit_ideas.py run")
    settings = {"hook": HOOK, "d_sae": D_SAE, "k": K, "batch_tokens": BATCH, "steps": STEPS, **BASE}
    settings["held_out_tokens"] = HELD_OUT_TOKENS
    write_json(RESULT, {"provenance": provenance(), "settings": settings, "rows": rows})


def spread(values: list[float], form: str) -> str:
    """Return mean, standard deviation and the number of seeds, as in the other tables of the page."""
    mean = form.format(statistics.mean(values))
    return f"{mean} ± {statistics.stdev(values):.4f} ({len(values)})" if len(values) > 1 else f"{mean} (1)"


AFTERWARDS = {
    "pursued": "2 rounds among 2k candidates",
    "pursued, 4k": "2 rounds among 4k candidates",
    "second pass, 0.5": "the k largest latents of x + 0.5 e, with e the residual of the first k",
    "second pass, 1": "the same with x + e",
    "second pass, 0.5, pursued": "2 rounds among the 2k largest latents of x + 0.5 e",
    "second pass, 1, pursued": "2 rounds among the 2k largest latents of x + e",
}


def of(kept: dict[str, Any], name: str, side: str) -> dict[int, dict[str, Any]]:
    """Return the rows of an idea by seed."""
    return {row["seed"]: row for row in kept["rows"] if (row["idea"], row["side"]) == (name, side)}


def markdown(kept: dict[str, Any]) -> str:
    """Return the generated part of the page."""
    tried: list[tuple[str, str, str | None, str]] = []
    for name, idea in IDEAS.items():
        tried += [(name, f"{name}: {idea.about}", None, side) for side in idea.sides]
        if name == "base":
            post_hoc = [(key, f"{name}, then {key}: {words}") for key, words in AFTERWARDS.items()]
            tried += [(name, label, key, side) for key, label in post_hoc for side in idea.sides]
    lines = []
    for name, label, post_hoc_key, side in tried:
        found, base = of(kept, name, side), of(kept, "base", side)
        if not found:
            continue
        ev = {
            seed: row["explained_variance"] if post_hoc_key is None else row["post_hoc"][post_hoc_key]
            for seed, row in found.items()
        }
        gains = [value - base[seed]["explained_variance"] for seed, value in ev.items() if seed in base]
        pursued_ev = [row["post_hoc"]["pursued"] for row in found.values() if row["post_hoc"]]
        lines.append(
            [
                label,
                side,
                spread(list(ev.values()), "{:.4f}"),
                "" if label.startswith("base: ") or not gains else spread(gains, "{:+.4f}"),
                spread([row["plain_explained_variance"] for row in found.values()], "{:.4f}"),
                "" if post_hoc_key or not pursued_ev else spread(pursued_ev, "{:.4f}"),
                f"{statistics.mean(row['unused_share'] for row in found.values()):.1%}",
                f"{next(iter(found.values()))['encoder_parameters']:,}",
            ]
        )
    headings = ["idea", "SAE", "EV, mean ± std (seeds)", "difference to base, same seeds", "EV of the encoder's codes"]
    headings += ["EV pursued afterwards", "never active", "encoder parameters"]
    about = kept["provenance"]
    made = f"Measured on {about['processor']}, commit {about['commit']} ([all figures](results/{RESULT.name}))."
    return "\n".join([*markdown_rows(headings, lines), "", made])


def main() -> None:
    """Run the command ``run`` or ``table``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", nargs="*", choices=list(IDEAS), default=list(IDEAS))
    parser.add_argument("--data", type=Path, default=Path("runs/research"))
    asked = parser.parse_args()
    torch.set_num_threads(1)  # so that sums do not depend on the number of processes
    (run if asked.what == "run" else table)(asked)
    if asked.what == "table":
        write_marked(PAGE, START, END, markdown(json.loads(RESULT.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
