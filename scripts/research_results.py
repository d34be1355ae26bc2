"""Measure ideas for reducing the gap between KronSAE and TopK at equal tokens, on equal activations.

    python scripts/research_results.py run [--seeds 3] [--only NAME ...] [--part 0/2]  # trains missing cells
    python scripts/research_results.py table  # writes the tables of docs/research-log.md

Activations of the bundled language model are harvested once into --data. A cell is one idea, SAE type and seed. Every
cell is trained on the same rows, in an order that depends on its seed, and scored on held-out documents. Results are
JSON lines in one file per part, so that several processes can share the work. Existing results are not recomputed.
Ideas without an improvement are implemented only in this script.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kronsae.core.encoders import KroneckerEncoder
from kronsae.core.gates import GATES, Gate
from kronsae.core.metrics import explained_variance
from kronsae.core.sparsifiers import TopK, TopKConfig
from kronsae.data.harvest import ActivationStream
from kronsae.data.model import ModelConfig, load_model
from kronsae.data.text import TextConfig, TextStream
from kronsae.data.tokens import TokenStream
from kronsae.runs.recipes import kron, topk
from kronsae.support.files import atomic_path, write_json, write_marked
from kronsae.support.provenance import provenance
from kronsae.training.config import MemberConfig
from kronsae.training.member import Member

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "docs" / "results" / "research.json"
LOG = ROOT / "docs" / "research-log.md"

HOOK = "layers.3"
D_SAE, K, BATCH, STEPS = 2048, 32, 1024, 600
HELD_OUT_TOKENS = 65_536
SIDES = ("topk", "kron")

Prepare = Callable[[Member], None]
EachStep = Callable[[Member, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Idea:
    """A change to TopK, KronSAE or both.

    Args:
        about: Description.
        sides: SAE types to which it applies; the others are the same as in ``base``.
        words: Keyword arguments for `kronsae.topk` and `kronsae.kron`, such as ``lr`` and ``init_norm``.
        topk: Keyword arguments for `kronsae.topk` only.
        kron: Keyword arguments for `kronsae.kron` only.
        config: Changes the member's config.
        prepare: Changes the member before its first step.
        each_step: Called before every step with (member, step, steps).
    """

    about: str
    sides: tuple[str, ...] = SIDES
    words: dict[str, Any] = field(default_factory=dict)
    topk: dict[str, Any] = field(default_factory=dict)
    kron: dict[str, Any] = field(default_factory=dict)
    config: Callable[[MemberConfig], MemberConfig] = lambda config: config
    prepare: Prepare = lambda member: None
    each_step: EachStep = lambda member, step, steps: None


def encoder_lr(scale: float) -> Prepare:
    """Return a change that trains the encoder with ``scale`` times the learning rate."""

    def prepare(member: Member) -> None:
        group = member.optimizer.param_groups[1]
        own = [parameter for parameter in group["params"] if parameter is not member.sae.decoder.b_dec]
        group["params"] = [member.sae.decoder.b_dec]
        member.optimizer.add_param_group({"params": own, "lr_scale": scale})

    return prepare


def only_touched(member: Member) -> None:
    """Leave weights and moments of rows without active latents unchanged, unlike Adam."""
    for group in member.optimizer.param_groups:
        group["only_touched"] = True


def k_warm_up(start: float, share: float) -> EachStep:
    """Return a schedule in which k decreases linearly from ``start * K`` to K over the first ``share`` of the steps."""

    def each_step(member: Member, step: int, steps: int) -> None:
        left = max(0.0, 1 - step / (share * steps))
        assert isinstance(member.sae.sparsifier, TopK)
        member.sae.sparsifier.config = TopKConfig(k=round(K * (1 + (start - 1) * left)))

    return each_step


@torch.no_grad()
def orthogonal_heads(member: Member) -> None:
    """Initialise the M + N rows of a head to be orthogonal, with unchanged norms."""
    encoder = member.sae.encoder
    assert isinstance(encoder, KroneckerEncoder)
    norms = encoder.weight.norm(dim=2, keepdim=True)
    encoder.weight.copy_(torch.linalg.qr(encoder.weight.transpose(1, 2))[0].transpose(1, 2) * norms)
    member.sae.decoder.initialize(encoder.initial_decoder_rows())


def rows_from_data(member: Member) -> None:
    """Initialise encoder rows with centred activations, with unchanged norms."""
    member.start_from_data = True  # type: ignore[attr-defined]


@torch.no_grad()
def start_from_data(member: Member, x_BD: Tensor) -> None:
    """Apply `rows_from_data` with the first batch."""
    weight = member.sae.encoder.weight.flatten(0, -2)  # type: ignore[union-attr, operator]
    generator = torch.Generator().manual_seed(member.config.seed + 2)
    chosen = torch.randint(len(x_BD), (len(weight),), generator=generator)
    rows = x_BD[chosen] - x_BD.mean(0)
    weight.copy_(rows / rows.norm(dim=1, keepdim=True) * weight.norm(dim=1, keepdim=True))
    member.sae.decoder.initialize(member.sae.encoder.initial_decoder_rows())


def extension_bias(value: float) -> Prepare:
    """Return a change that initialises extension biases with ``value`` times the expected |v|."""

    @torch.no_grad()
    def prepare(member: Member) -> None:
        encoder = member.sae.encoder
        assert isinstance(encoder, KroneckerEncoder)
        # on centred activations of norm sqrt(D), a row of norm r gives v of standard deviation about r
        encoder.bias[:, encoder.d_base :] = value * float(encoder.weight.norm(dim=2).mean())

    return prepare


class _EqualSlopes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor) -> Tensor:
        on = (u > 0) & (v > 0)
        ctx.save_for_backward(on)
        return u.relu().sqrt() * v.relu().sqrt()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (on,) = ctx.saved_tensors
        return torch.where(on, 0.5 * grad, 0.0), torch.where(on, 0.5 * grad, 0.0)


class _BoundedSlopes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor) -> Tensor:
        root_u, root_v = u.relu().sqrt(), v.relu().sqrt()
        ctx.save_for_backward(root_u, root_v)
        return root_u * root_v

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        root_u, root_v = ctx.saved_tensors
        on = (root_u > 0) & (root_v > 0)
        slopes = (torch.where(on, 0.5 * a / b, 0.0).clamp(max=1.0) for a, b in ((root_v, root_u), (root_u, root_v)))
        return tuple(grad * slope for slope in slopes)


def mean_on_support(u: Tensor, v: Tensor) -> Tensor:
    """Return ``(u + v) / 2`` where both are positive, and 0 elsewhere; TopK ranks by the product."""
    return torch.where((u > 0) & (v > 0), 0.5 * (u + v), 0.0)


def with_gate(gate: Gate) -> Prepare:
    """Return a change that uses a gate which is not part of the library."""

    def prepare(member: Member) -> None:
        encoder = member.sae.encoder
        assert isinstance(encoder, KroneckerEncoder)
        name = f"research-{id(gate)}"
        GATES[name] = gate
        object.__setattr__(encoder.config, "gate", name)

    return prepare


def aux(weight: float) -> dict[str, Any]:
    """Return the keyword arguments that set the weight of AuxK."""
    return {"aux_weight": weight}


BASE = {"lr": 16e-3, "init_norm": 0.15}
IDEAS: dict[str, Idea] = {
    "base": Idea(
        about="unit-norm decoder, AuxK 1/32 after 150,000 tokens, mAND, (2, 4), lr 0.016, initial row norm 0.15"
    ),
    **{
        f"lr {lr:g}, start {norm:g}": Idea(
            about=f"lr {lr:g}, initial row norm {norm:g}", words={"lr": lr, "init_norm": norm}
        )
        for lr, norm in (
            (4e-3, 0.15),
            (8e-3, 0.15),
            (8e-3, 0.5),
            (16e-3, 0.5),
            (32e-3, 0.15),
        )
    },
    **{
        f"{d_sae:,} latents, lr {lr:g}": Idea(
            about="different dictionary size", words={"lr": lr}, topk={"d_sae": d_sae}, kron={"num_heads": d_sae // 8}
        )
        for d_sae in (512, 4096)
        for lr in (8e-3, 16e-3, 32e-3)
    },
    "revival": Idea(
        about="dead latents are reinitialised every 100,000 tokens in the first half, in addition to AuxK",
        config=lambda config: replace(config, revive_every_tokens=100_000),
    ),
    "free decoder norm": Idea(about="rows of W_dec have unconstrained norms", words={"unit_norm_decoder": False}),
    "no AuxK": Idea(about="without the auxiliary loss on dead latents", words=aux(0.0)),
    "only touched rows": Idea(
        about="the optimiser does not update rows without gradient (faster, but not equal to Adam)",
        prepare=only_touched,
    ),
    "encoder rate / 3": Idea(about="encoder learning rate 1/3 of the decoder's", prepare=encoder_lr(1 / 3)),
    "encoder rate x 3": Idea(about="encoder learning rate 3 times the decoder's", prepare=encoder_lr(3.0)),
    "k from 4k": Idea(about="k decreases from 4k to k over the first half", each_step=k_warm_up(4, 0.5)),
    "rows from data": Idea(about="encoder rows initialised with centred activations", prepare=rows_from_data),
    "orthogonal heads": Idea(
        about="rows of a head initialised to be orthogonal", sides=("kron",), prepare=orthogonal_heads
    ),
    "extensions well on": Idea(
        about="extension biases initialised to 2 standard deviations", sides=("kron",), prepare=extension_bias(2.0)
    ),
    "equal slopes": Idea(
        about="value of mAND, gradient 1/2 for both parents",
        sides=("kron",),
        prepare=with_gate(Gate(lambda u, v: _EqualSlopes.apply(u, v), "product", homogeneous=True)),
    ),
    "bounded slopes": Idea(
        about="value of mAND, gradients clipped at 1",
        sides=("kron",),
        prepare=with_gate(Gate(lambda u, v: _BoundedSlopes.apply(u, v), "product", homogeneous=True)),
    ),
    "mean as value": Idea(
        about="TopK ranks by mAND, but the latent's value is (u + v) / 2",
        sides=("kron",),
        prepare=with_gate(Gate(mean_on_support, "product", homogeneous=True)),
    ),
    "learned gate": Idea(about="power mean with a learned exponent", sides=("kron",), kron={"gate": "power_mean"}),
    **{
        f"{m} x {n}, {what}": Idea(
            about=f"({m}, {n}), {heads} heads",
            sides=("kron",),
            kron={"num_heads": heads, "d_base": m, "d_extension": n},
        )
        for m, n, heads, what in (
            (2, 2, 512, "equal encoder"),
            (2, 4, 341, "equal encoder"),
            (4, 4, 256, "equal encoder"),
            (4, 8, 170, "equal encoder"),
            (4, 4, 128, "equal latents"),
            (4, 8, 64, "equal latents"),
        )
    },
}


def build(idea: Idea, side: str, seed: int, steps: int, d_in: int) -> Member:
    """Return the member of one cell."""
    words: dict[str, Any] = {"k": K, **BASE, "dead_after_tokens": 150_000, "seed": seed}
    words |= idea.words
    if side == "topk":
        config = topk(**({"d_sae": D_SAE} | words | idea.topk))
    else:
        config = kron(**({"num_heads": 256, "d_base": 2, "d_extension": 4} | words | idea.kron))
    member = Member(idea.config(config), d_in, HOOK, steps)
    idea.prepare(member)
    return member


def train(idea: Idea, side: str, seed: int, train_ND: np.ndarray[Any, Any], held_out_ND: Tensor) -> dict[str, Any]:
    """Train one cell and return its scores."""
    started = perf_counter()
    steps = len(train_ND) // BATCH
    member = build(idea, side, seed, steps, train_ND.shape[1])
    order = np.random.default_rng(seed).permutation(len(train_ND))
    for step in range(steps):
        x_BD = torch.from_numpy(train_ND[np.sort(order[step * BATCH : (step + 1) * BATCH])])
        if step == 0 and getattr(member, "start_from_data", False):
            start_from_data(member, x_BD)
        idea.each_step(member, step, steps)
        member.step(x_BD, step, want_metrics=False)
    idea.each_step(member, steps, steps)
    sae = member.finished_sae()
    used_F = torch.zeros(sae.d_sae, dtype=torch.bool)
    x_hat, l0 = [], 0.0
    with torch.no_grad():
        for x_BD in held_out_ND.split(8192):
            codes = sae.encode(x_BD)
            used_F[codes.indices[codes.active]] = True
            l0 += float(codes.active.sum()) / len(held_out_ND)
            x_hat.append(sae.decode(codes))
    return {
        "explained_variance": explained_variance(held_out_ND, torch.cat(x_hat)),
        "l0": l0,
        "unused_share": 1 - float(used_F.float().mean()),
        "d_sae": sae.d_sae,
        "encoder_parameters": sum(parameter.numel() for parameter in sae.encoder.parameters()),
        "exponent": getattr(sae.encoder, "gate_exponent", None),
        "seconds": perf_counter() - started,
    }


def activations(
    folder: Path, steps: int = STEPS, held_out_tokens: int = HELD_OUT_TOKENS
) -> tuple[np.ndarray[Any, Any], Tensor]:
    """Return training (memory-mapped) and held-out activations ``[tokens, D]``, harvested if they do not exist."""
    sizes = {"train": steps * BATCH, "held_out": held_out_tokens}
    for name, tokens in sizes.items():
        path = folder / f"{name}-{tokens}.npy"
        if not path.exists():
            rows = np.concatenate(list(_harvest(tokens, held_out=name == "held_out")))[:tokens]
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                np.save(file, rows, allow_pickle=False)
    train_ND = np.load(folder / f"train-{sizes['train']}.npy", mmap_mode="r", allow_pickle=False)
    return train_ND, torch.from_numpy(np.load(folder / f"held_out-{sizes['held_out']}.npy", allow_pickle=False))


def _harvest(tokens: int, *, held_out: bool) -> Iterator[np.ndarray[Any, Any]]:
    model = load_model(ModelConfig(name="bundled"))
    text = partial(TextStream, TextConfig(source="bundled"), held_out=held_out, held_out_share=0.05, repeat=False)
    windows = partial(TokenStream, text, model.tokenizer, context_length=256, batch_sequences=32)
    left = tokens
    for values, _ in ActivationStream(model, HOOK, windows):
        yield values[HOOK].numpy()
        left -= len(values[HOOK])
        if left <= 0:
            return
    raise SystemExit(f"the bundled text ended {left} tokens early")


def run(arguments: argparse.Namespace) -> None:
    """Train the cells without results."""
    part, parts = (int(number) for number in arguments.part.split("/"))
    arguments.data.mkdir(parents=True, exist_ok=True)
    train_ND, held_out_ND = activations(arguments.data)
    names = arguments.only or list(IDEAS)
    cells = [(name, side, seed) for seed in range(arguments.seeds) for name in names for side in IDEAS[name].sides]
    for number, (name, side, seed) in enumerate(cells):
        if number % parts != part or (name, side, seed) in measured(arguments.data):
            continue
        row = {"idea": name, "side": side, "seed": seed, **train(IDEAS[name], side, seed, train_ND, held_out_ND)}
        with (arguments.data / f"results-{part}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{name:26s} {side} seed {seed}  EV {row['explained_variance']:.4f}  {row['seconds']:.0f} s", flush=True)


def measured(folder: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Return the existing results by cell."""
    rows = [
        json.loads(line) for path in sorted(folder.glob("results-*.jsonl")) for line in path.read_text().splitlines()
    ]
    return {(row["idea"], row["side"], row["seed"]): row for row in rows}


def table(arguments: argparse.Namespace) -> None:
    """Write the results into the result file and the tables of the research log."""
    rows = list(measured(arguments.data).values())
    if not rows:
        raise SystemExit("nothing is measured yet: python scripts/research_results.py run")
    about = {"hook": HOOK, "k": K, "batch_tokens": BATCH, "steps": STEPS, "held_out_tokens": HELD_OUT_TOKENS}
    write_json(RESULT, {"provenance": provenance(), "settings": about, "rows": rows})
    for mark, lines in (("rates", _rates(rows)), ("sizes", _sizes(rows)), ("ideas", _ideas(rows))):
        write_marked(LOG, f"<!-- results:{mark} -->", f"<!-- /results:{mark} -->", "\n".join(lines))


def _values(rows: list[dict[str, Any]], idea: str, side: str) -> dict[int, dict[str, Any]]:
    return {row["seed"]: row for row in rows if row["idea"] == idea and row["side"] == side}


def _spread(values: list[float], form: str) -> str:
    mean = form.format(statistics.mean(values))
    return f"{mean} ± {statistics.stdev(values):.4f} ({len(values)})" if len(values) > 1 else f"{mean} (1)"


def _rates(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| lr, initial row norm | TopK EV | KronSAE EV |", "|---|---|---|"]
    for name in IDEAS:
        if name == "base" or name.startswith("lr "):
            cells = [[row["explained_variance"] for row in _values(rows, name, side).values()] for side in SIDES]
            if all(cells):
                label = "lr 0.016, start 0.15" if name == "base" else name
                lines.append(f"| {label} | " + " | ".join(_spread(values, "{:.4f}") for values in cells) + " |")
    return lines


def _sizes(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| latents | lr | TopK EV | KronSAE EV |", "|---|---|---|---|"]
    names = {(D_SAE, 8e-3): "lr 0.008, start 0.15", (D_SAE, 16e-3): "base", (D_SAE, 32e-3): "lr 0.032, start 0.15"}
    for d_sae in (512, D_SAE, 4096):
        for lr in (8e-3, 16e-3, 32e-3):
            name = names.get((d_sae, lr), f"{d_sae:,} latents, lr {lr:g}")
            cells = [[row["explained_variance"] for row in _values(rows, name, side).values()] for side in SIDES]
            if all(cells):
                lines.append(
                    f"| {d_sae:,} | {lr:g} | " + " | ".join(_spread(values, "{:.4f}") for values in cells) + " |"
                )
    return lines


def _ideas(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| idea | SAE | EV, mean ± std (seeds) | difference to base, same seeds | never active | latents "
        "| encoder parameters |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for name, idea in IDEAS.items():
        if name.startswith("lr ") or "latents, lr" in name:
            continue
        for side in idea.sides:
            found, base = _values(rows, name, side), _values(rows, "base", side)
            if not found:
                continue
            pairs = [
                found[seed]["explained_variance"] - base[seed]["explained_variance"] for seed in found if seed in base
            ]
            of = list(found.values())
            lines.append(
                f"| {name}: {idea.about} | {side} | {_spread([row['explained_variance'] for row in of], '{:.4f}')} | "
                + ("" if name == "base" or not pairs else _spread(pairs, "{:+.4f}"))
                + f" | {statistics.mean(row['unused_share'] for row in of):.1%} | {of[0]['d_sae']:,} | "
                f"{of[0]['encoder_parameters']:,} |"
            )
    return lines


def main() -> None:
    """Run the command ``run`` or ``table``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=list(IDEAS))
    parser.add_argument("--part", default="0/1", help="this process's share of the work, such as 0/2 and 1/2")
    parser.add_argument("--data", type=Path, default=Path("runs/research"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # so that sums do not depend on the number of processes
    (run if arguments.what == "run" else table)(arguments)


if __name__ == "__main__":
    main()
