"""Damaged and hostile folders of every format: a clear error or a correct load, and nothing else.

Never another exception, a hang, a huge allocation, or an executed byte. A folder whose files still say the same, as the
libraries that write them read them, must give an SAE that computes the same. The quick suite loads 60 damaged folders
of each format, ``-m slow`` 1,000.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.interop import sae_lens_folders
from tests.interop.foreign_saes import dictionary_learning, gemma_scope, sparsify
from tests.interop.mutations import MUTATIONS, mutated

import kronsae as ks
from kronsae.interop import saelens_layout
from kronsae.interop.formats import FORMATS
from kronsae.interop.formats.dictionary_learning import CLASSES
from kronsae.support.errors import UserError
from kronsae.support.files import sha256
from kronsae.support.sealed import write_sealed

MAX_CPU_SECONDS = 2.0
MAX_SECONDS = 30
"""Elapsed time after which a load counts as blocked; long, because other processes may hold the processor."""

MAX_BYTES = 2**29
"""Growth of the process's memory while all damaged folders of a format are loaded; the SAEs themselves take 10 kB."""

MAX_MESSAGE = 3000
"""Characters of an error message."""

Write = Callable[[Path], Any]


def _own(member: ks.MemberConfig, dtype: torch.dtype = torch.float32) -> Write:
    return lambda folder: ks.save(member.shape(16, "layers.2").build().to(dtype), folder)


def _sae_lens(folder: Path, case: str) -> None:
    sae_lens_folders.write(folder, *sae_lens_folders.make(case))


def _sae_lens_of_ours(folder: Path, architecture: str, d_out: int | None = None) -> None:
    """Write an SAE with one of the architectures that kronsae adds to SAELens; without ``d_out``, in bfloat16."""
    sizes: dict[str, Any] = {"d_in": 16, "d_sae": 40, "d_base": 2, "d_extension": 4, "gate": "mand", "k": 5}
    roles: dict[str, Any] = {} if d_out is None else {"d_out": d_out, "skip": True}
    sae = saelens_layout.kron_config(architecture, **sizes, **roles).build(seed=1)
    dtype = "bfloat16" if d_out is None else "float32"
    weights = saelens_layout.to_disk(sae.to(getattr(torch, dtype)).state_dict())
    about = {"architecture": architecture, "metadata": sae_lens_folders.METADATA, "dtype": dtype}
    sae_lens_folders.write(folder, sizes | roles | about, weights)


def _sae_lens_before_6(folder: Path) -> None:
    config, weights = sae_lens_folders.make("topk")
    old = {"d_in": config["d_in"], "d_sae": config["d_sae"], "dtype": "torch.float32", "hook_point": "blocks.6"}
    old |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 7}}
    sae_lens_folders.write(folder, old, weights)


SOURCES: dict[str, list[Write]] = {
    "kronsae": [
        _own(ks.topk(d_sae=40, k=5)),
        _own(ks.kron(num_heads=10, d_base=2, d_extension=2, k=5, gate="power_mean")),
        _own(ks.jumprelu(d_sae=40, k=5)),
        _own(ks.switch(d_sae=40, k=5, num_experts=4)),
        _own(ks.topk(d_sae=40, k=5, read="a", write="b", skip=True)),
        _own(ks.kron(num_heads=10, d_base=2, d_extension=2, k=5, null_symbols=True), torch.bfloat16),
        _own(ks.kron(num_heads=10, d_base=2, d_extension=2, k=5, pursuit_rounds=2), torch.float64),
    ],
    "sae_lens": [
        *(partial(_sae_lens, case=case) for case in sae_lens_folders.SETTINGS),
        *(partial(_sae_lens_of_ours, architecture=name) for name in ("kronsae_topk", "kronsae_batchtopk")),
        partial(_sae_lens_of_ours, architecture="kronsae_jumprelu_transcoder", d_out=10),
        _sae_lens_before_6,
    ],
    "gemma_scope": [gemma_scope],
    "sparsify": [sparsify, partial(sparsify, transcode=True, skip_connection=True)],
    "dictionary_learning": [partial(dictionary_learning, kind=kind) for kind in CLASSES],
}
"""Whole folders of each format, which are damaged."""


def test_every_format_that_is_read_is_damaged() -> None:
    assert SOURCES.keys() == {"kronsae", *FORMATS}


@contextmanager
def limited() -> Iterator[None]:
    """Within, an allocation of more than 4 GB fails, and a blocked system call ends with an error."""

    def blocked(*_: Any) -> None:
        raise TimeoutError("the load does not end")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + 2**32, hard))
    before = signal.signal(signal.SIGALRM, blocked)
    signal.alarm(MAX_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def load(folder: Path) -> str:
    """Load an SAE and use it; return ``"loaded"``, ``"refused"`` or the traceback of another exception."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*names no weights_sha256")
            sae = ks.load(folder)
        x = torch.zeros(2, sae.d_in, dtype=sae.W_dec.dtype)
        if sae.unsound_weight() is None:
            assert sae(x).shape == (2, sae.d_out)
    except UserError as error:
        text = str(error)
        printable = text.encode(errors="replace").decode() == text
        return "refused" if printable and len(text) < MAX_MESSAGE else f"the message is {text!r}"
    except BaseException:
        return traceback.format_exc()
    return "loaded"


INFORMS = {
    "kronsae": {"metadata", "weights_sha256", "sha256", "kronsae_version", "architecture"},
    "dictionary_learning": {"buffer", "lm_name", "layer", "submodule_name", "steps", "seed"},
}
"""Keys of the configs that change nothing of what an SAE computes."""


def without(config: Any, keys: set[str]) -> Any:
    """Return a config without some keys, at any depth."""
    if isinstance(config, dict):
        return {key: without(value, keys) for key, value in config.items() if key not in keys}
    return [without(value, keys) for value in config] if isinstance(config, list) else config


def meaning(folder: Path, form: str) -> tuple[str, dict[str, Any]] | None:
    """Return config and tensors as Python's JSON, safetensors, NumPy and torch read them; None: they do not."""
    try:
        configs = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))]
        tensors: dict[str, Any] = {}
        for path in sorted(folder.iterdir()):
            if path.suffix == ".safetensors":
                tensors |= load_file(path)
            elif path.suffix == ".npz":
                with np.load(path, allow_pickle=False) as arrays:
                    tensors |= {name.lower(): torch.from_numpy(array.copy()) for name, array in arrays.items()}
            elif path.suffix == ".pt":
                tensors |= torch.load(path, weights_only=True)
    except Exception:
        return None
    return json.dumps(without(configs, INFORMS.get(form, set())), sort_keys=True), tensors


def same_meaning(one: tuple[str, dict[str, Any]] | None, other: tuple[str, dict[str, Any]] | None) -> bool:
    if one is None or other is None or one[0] != other[0] or one[1].keys() != other[1].keys():
        return False
    return all(torch.equal(tensor, other[1][name]) for name, tensor in one[1].items())


@torch.no_grad()
def computed(folder: Path) -> list[torch.Tensor]:
    """Return latents and reconstructions of the SAE in a folder."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*names no weights_sha256")
        sae = ks.load(folder)
    x = torch.randn(20, sae.d_in, generator=torch.Generator().manual_seed(5)).to(sae.W_dec.dtype)
    codes = sae.encode(x)
    return [codes.to_dense(), sae.decode(codes, x)]


def repair_digest(folder: Path) -> None:
    """Write the digests of the damaged weights and config into our config, as a hostile stranger would."""
    try:
        config = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
        config["weights_sha256"] = sha256(folder / "sae_weights.safetensors")
        write_sealed(folder / "cfg.json", config)
    except (OSError, ValueError, TypeError, RecursionError):
        pass


def is_small(folder: Path) -> bool:
    files = [path for path in (folder / "cfg.json", folder / "sae_weights.safetensors") if path.is_file()]
    return len(files) == 2 and all(path.stat().st_size < 2**20 for path in files)


def damage(form: str, count: int, tmp_path: Path) -> None:
    """Load ``count`` damaged folders of a format, and assert that each is refused or loads."""
    whole = []
    for number, write in enumerate(SOURCES[form]):
        write(tmp_path / f"whole-{number}")
        whole.append(tmp_path / f"whole-{number}")
        assert load(whole[-1]) == "loaded"
    trap, outcomes = tmp_path / "trap", {"loaded": 0, "refused": 0}
    meanings, values = [meaning(one, form) for one in whole], [computed(one) for one in whole]
    assert None not in meanings
    unchanged = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(count):
        folder = tmp_path / "damaged"
        kinds = mutated(whole[seed % len(whole)], folder, seed, trap)
        if form == "kronsae" and seed % 3 and is_small(folder):
            repair_digest(folder)
        start = time.process_time()
        with limited():
            outcome = load(folder)
        spent = time.process_time() - start
        assert outcome in outcomes, f"seed {seed}, {' and '.join(kinds)}: {outcome}"
        assert spent < MAX_CPU_SECONDS, f"seed {seed}, {' and '.join(kinds)}: {spent:.1f} s"
        assert not trap.exists(), f"seed {seed}, {' and '.join(kinds)}: a byte was executed"
        outcomes[outcome] += 1
        if outcome == "loaded" and same_meaning(meanings[seed % len(whole)], meaning(folder, form)):
            unchanged += 1
            pairs = zip(computed(folder), values[seed % len(whole)], strict=True)
            assert all(torch.equal(*pair) for pair in pairs), f"seed {seed}, {' and '.join(kinds)}: other values"
        shutil.rmtree(folder)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown < MAX_BYTES, f"{grown:,} bytes"
    assert outcomes["refused"] > count / 3, outcomes
    assert 0 < unchanged <= outcomes["loaded"], (unchanged, outcomes)


@pytest.mark.parametrize("form", SOURCES)
def test_a_sample(form: str, tmp_path: Path) -> None:
    damage(form, 60, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("form", SOURCES)
def test_a_thousand(form: str, tmp_path: Path) -> None:
    damage(form, 1000, tmp_path)


def test_every_kind_of_damage_is_seen_in_the_sample(tmp_path: Path) -> None:
    dictionary_learning(tmp_path / "whole", "AutoEncoderTopK")
    seen = {kind for seed in range(60) for kind in mutated(tmp_path / "whole", tmp_path / "x", seed, tmp_path / "trap")}
    assert seen == MUTATIONS.keys()


class TestTheCheckSees:
    """The test would notice each of the failures that it looks for."""

    def test_another_exception(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ks, "load", dict[Path, Any]().__getitem__)
        assert "KeyError" in load(tmp_path)

    def test_other_values(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A reader that gives another SAE when something follows the archive."""
        load = ks.load

        def worse(folder: Path) -> Any:
            sae = load(folder)
            if folder.name == "damaged":
                with torch.no_grad():
                    sae.W_dec[3] *= 1.001
            return sae

        monkeypatch.setattr(ks, "load", worse)
        with pytest.raises(AssertionError, match="other values"):
            damage("gemma_scope", 60, tmp_path)

    def test_a_huge_allocation(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ks, "load", lambda folder: bytearray(2**33))
        with limited():
            assert "MemoryError" in load(tmp_path)

    def test_a_blocked_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tests.interop.test_mutations.MAX_SECONDS", 1)
        os.mkfifo(tmp_path / "pipe")
        monkeypatch.setattr(ks, "load", lambda folder: (tmp_path / "pipe").read_text())
        with limited():
            assert "TimeoutError" in load(tmp_path)
