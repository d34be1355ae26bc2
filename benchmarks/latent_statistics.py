"""Measure speed and peak memory of the statistics of all latents at full size, separately from the model's time.

python benchmarks/latent_statistics.py [--codes model|random] [--tokens 2000000] [--threads 1]

``model``: the bundled model's activations on the bundled text, encoded by an untrained KronSAE with 32,768 latents.
``random``: codes with independent random latents and tokens, so that hardly any (latent, token) pair occurs twice. This
is the maximum memory for the token entropy.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter, process_time

import torch
from torch import Tensor

from kronsae.bench.machine import peak_bytes, reset_peak
from kronsae.core.codes import SparseCodes
from kronsae.core.encoders import KroneckerEncoder, KroneckerEncoderConfig
from kronsae.core.normalization import Normalization
from kronsae.core.sae import SAE, SAEConfig
from kronsae.core.sparsifiers import TopKConfig
from kronsae.data.model import ModelConfig, resolve_hook
from kronsae.data.text import TextConfig
from kronsae.eval.hooked import Windows, hidden_states, kept, vocabulary_size
from kronsae.eval.profiles import PreLatentMeter, ProfileMeter, pre_latent_rows
from kronsae.runs.config import RunConfig
from kronsae.runs.pipeline import Source
from kronsae.runs.recipes import kron
from kronsae.support.files import read_json, write_json
from kronsae.support.provenance import provenance
from kronsae.training.config import LoopConfig

RESULT = Path(__file__).parent / "results" / "latent_statistics.json"
HEADS, BASES, EXTENSIONS, K = 4096, 2, 4, 50  # 32,768 latents, the paper's smallest dictionary
WINDOWS, LENGTH, VOCABULARY = 32, 256, 4096


class Clock:
    """Measure wall time and processor time by activity.

    Processor time does not depend on other load of the machine. It is summed over threads.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}
        self._last, self._last_cpu = perf_counter(), process_time()

    def lap(self, what: str) -> None:
        now, now_cpu = perf_counter(), process_time()
        self.seconds[what] = self.seconds.get(what, 0.0) + now - self._last
        self.cpu_seconds[what] = self.cpu_seconds.get(what, 0.0) + now_cpu - self._last_cpu
        self._last, self._last_cpu = now, now_cpu


def random_codes(tokens: int, d_sae: int, clock: Clock) -> Iterator[tuple[Windows, SparseCodes]]:
    """Yield codes with independent random latents and tokens; the latents of a token are distinct."""
    generator = torch.Generator().manual_seed(0)
    keep_ST = torch.ones(WINDOWS, LENGTH, dtype=torch.bool)
    size, stride = keep_ST.numel(), d_sae // K
    for first in range(0, tokens, size):
        ids_ST = torch.randint(VOCABULARY, keep_ST.shape, generator=generator, dtype=torch.int32)
        indices_NK = torch.randint(stride, (size, K), generator=generator) + stride * torch.arange(K)
        codes = SparseCodes(torch.rand(size, K, generator=generator) + 0.1, indices_NK, d_sae)
        clock.lap("codes")
        yield Windows(ids_ST, keep_ST, keep_ST, first // LENGTH), codes


class Bundled:
    """The bundled model and an untrained KronSAE that encodes its activations."""

    def __init__(self) -> None:
        shape = kron(num_heads=HEADS, d_base=BASES, d_extension=EXTENSIONS, k=K)
        config = RunConfig(
            model=ModelConfig(device="cpu"),
            text=TextConfig(source="bundled"),
            hook="layers.3",
            saes=(shape,),
            loop=LoopConfig(tokens=2**20, batch_tokens=2048),
            context_length=LENGTH,
            model_batch=WINDOWS,
        )
        self._source = Source(config)
        self.sae: SAE | None = None

    @property
    def vocabulary(self) -> int:
        return vocabulary_size(self._source.language_model)

    @torch.no_grad()
    def codes(self, tokens: int, clock: Clock) -> Iterator[tuple[Windows, Tensor, SparseCodes]]:
        language_model = self._source.language_model
        hook = resolve_hook(language_model.model, "layers.3")
        done, first = 0, 0
        for batch, _ in self._source.tokens(held_out=False)(state=None):
            windows = Windows(batch.input_ids_ST.to(torch.int32), batch.attention_mask_ST.bool(), batch.keep_ST, first)
            x_ND = kept(hidden_states(language_model, hook, windows), windows)
            if self.sae is None:
                encoder = KroneckerEncoderConfig(num_heads=HEADS, d_base=BASES, d_extension=EXTENSIONS)
                self.sae = SAEConfig(d_in=x_ND.shape[1], encoder=encoder, sparsifier=TopKConfig(k=K)).build()
                Normalization.of(x_ND).fold(self.sae)
            clock.lap("model")
            codes = self.sae.encode(x_ND)
            clock.lap("encode")
            yield windows, x_ND, codes
            done, first = done + len(x_ND), first + len(windows)
            if done >= tokens:
                return


def main() -> None:
    """Measure, print, and add the results to the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", choices=("model", "random"), default="model")
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--pre-latent-tokens", type=int, default=32_768)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    d_sae = HEADS * BASES * EXTENSIONS
    bundled = Bundled() if arguments.codes == "model" else None
    vocabulary = VOCABULARY if bundled is None else bundled.vocabulary
    reset_peak()
    clock = Clock()
    meter = ProfileMeter(d_sae, vocabulary)
    pre: list[PreLatentMeter] = []
    tokens = pre_tokens = 0
    if bundled is None:
        for windows, codes in random_codes(arguments.tokens, d_sae, clock):
            meter.update(windows, codes)
            tokens += windows.num_kept
            clock.lap("statistics of latents")
    else:
        for windows, x_ND, codes in bundled.codes(arguments.tokens, clock):
            meter.update(windows, codes)
            tokens += len(x_ND)
            clock.lap("statistics of latents")
            if pre_tokens < arguments.pre_latent_tokens:
                assert bundled.sae is not None
                encoder = bundled.sae.encoder
                assert isinstance(encoder, KroneckerEncoder)
                pre = pre or [PreLatentMeter(encoder, rows, vocabulary) for rows in pre_latent_rows(encoder)]
                for one in pre:
                    one.update(windows, x_ND)
                pre_tokens += len(x_ND)
                clock.lap("statistics of bases and extensions")
    profiles = [meter.value(), *(one.value() for one in pre)]
    clock.lap("statistics of latents")
    statistics, in_all = clock.seconds["statistics of latents"], sum(clock.seconds.values())
    statistics_cpu = clock.cpu_seconds["statistics of latents"]
    found = {
        "codes": arguments.codes,
        "d_sae": d_sae,
        "k": K,
        "vocabulary": vocabulary,
        "tokens": tokens,
        "pre_latent_tokens": pre_tokens,
        "threads": arguments.threads,
        "seconds": {what: round(seconds, 2) for what, seconds in clock.seconds.items()},
        "cpu_seconds": {what: round(seconds, 2) for what, seconds in clock.cpu_seconds.items()},
        "seconds_in_all": round(in_all, 2),
        "statistics_tokens_per_second": round(tokens / statistics),
        "statistics_tokens_per_cpu_second": round(tokens / statistics_cpu),
        "tokens_per_second_in_all": round(tokens / in_all),
        "peak_bytes": peak_bytes(),
        "pairs": meter.num_pairs,
        "entropy_tokens": profiles[0].entropy_tokens,
        "provenance": provenance(),
    }
    for key, value in found.items():
        print(f"{key}: {value}")
    known = read_json(RESULT, "the benchmark's result") if RESULT.exists() else {}
    write_json(RESULT, {**known, arguments.codes: found})


if __name__ == "__main__":
    main()
