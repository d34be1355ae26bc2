"""Gemma Scope's archives, compared with the formula of a JumpReLU, damaged ones, and bombs."""

from __future__ import annotations

import io
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kronsae.interop import formats
from kronsae.support.errors import UserError

D_IN, D_SAE = 12, 40


def arrays(seed: int = 0, d_out: int = D_IN) -> dict[str, Any]:
    """Return the arrays of an SAE."""
    draw = np.random.default_rng(seed).standard_normal
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, d_out)}
    shapes |= {"b_dec": (d_out,), "threshold": (D_SAE,)}
    return {name: draw(shape).astype(np.float32) for name, shape in shapes.items()}


def write(folder: Path, found: dict[str, Any]) -> Path:
    """Write an archive as NumPy does."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "params.npz", **found)
    return folder


@torch.no_grad()
def largest_difference(folder: Path, found: dict[str, Any]) -> float:
    """Compare latents and reconstruction with the formula, in float64."""
    x = torch.randn(64, D_IN)
    w = {name.lower(): torch.from_numpy(array).double() for name, array in found.items()}
    pre = x.double() @ w["w_enc"] + w["b_enc"]
    acts = pre.relu() * (pre > w["threshold"])
    expected = acts @ w["w_dec"] + w["b_dec"]
    if "w_skip" in w:
        expected = expected + x.double() @ w["w_skip"].T
    sae = formats.read(folder).sae
    codes = sae.encode(x)
    assert torch.equal(codes.to_dense() != 0, acts != 0)
    return max(float((codes.to_dense() - acts).abs().max()), float((sae.decode(codes, x) - expected).abs().max()))


def test_an_archive_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "gemma-scope-2b-pt-res" / "layer_12" / "width_16k" / "average_l0_82", arrays())
    assert formats.recognize(folder) == "gemma_scope"
    assert largest_difference(folder, arrays()) <= 1e-5
    found = formats.read(folder)
    assert (found.model, found.hook_read, found.hook_write) == ("google/gemma-2-2b", "blocks.12.hook_resid_post", None)
    assert (found.settings["l0"], found.sae.config.sparsifier.k) == (82.0, D_SAE)
    assert found.sae.config.autoencodes


def test_names_may_be_lower_case_and_numbers_of_other_types(tmp_path: Path) -> None:
    found = {name.lower(): array.astype(">f8") for name, array in arrays().items()}
    folder = write(tmp_path / "sae", found)
    assert largest_difference(folder, {name: array.astype("<f8") for name, array in found.items()}) <= 1e-5
    assert formats.read(folder).model is None


def test_fortran_order_and_packed_members_are_read(tmp_path: Path) -> None:
    found: dict[str, Any] = {name: np.asfortranarray(array) for name, array in arrays().items()}
    (tmp_path / "sae").mkdir()
    np.savez_compressed(tmp_path / "sae" / "params.npz", **found)
    assert largest_difference(tmp_path / "sae", found) <= 1e-5


@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_is_read(skip: bool, tmp_path: Path) -> None:
    found = arrays()
    if skip:
        found["W_skip"] = np.random.default_rng(1).standard_normal((D_IN, D_IN)).astype(np.float32)
    folder = write(tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_3" / "width_16k" / "average_l0_5", found)
    assert largest_difference(folder, found) <= 1e-5
    read = formats.read(folder)
    assert (read.sae.config.role, read.hook_read, read.hook_write) == (
        *("skip_transcoder" if skip else "transcoder", "blocks.3.ln2.hook_normalized", "blocks.3.hook_mlp_out"),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"W_enc": np.zeros((D_IN, 3), np.float32)}, "must have shape"),
        ({"threshold": np.zeros(3, np.float32)}, r"threshold must have shape \(40,\)"),
        ({"b_dec": np.zeros((), np.float32)}, "w_enc must have two dimensions and b_dec one"),
        ({"W_enc": np.zeros((0, 0), np.float32)}, "d_in must be a whole number"),
        ({"b_enc": np.zeros(D_SAE, np.int64)}, "b_enc holds int64"),
        ({"b_enc": np.zeros(D_SAE, np.complex64)}, "b_enc holds complex64"),
        ({"b_enc": np.full(D_SAE, np.nan, np.float32)}, "must be finite"),
        ({"scaling_factor": np.full(D_SAE, 2, np.float32)}, "scaling_factor must be 1"),
        ({"extra": np.zeros(3, np.float32)}, "arrays must be .* got 'extra.npy|arrays must be"),
        ({"B_ENC": np.zeros(D_SAE, np.float32)}, "each once"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        formats.read(write(tmp_path / "sae", arrays() | changes))


def test_a_missing_array_is_named(tmp_path: Path) -> None:
    found = arrays()
    del found["threshold"]
    with pytest.raises(UserError, match="threshold is missing"):
        formats.read(write(tmp_path / "sae", found))


def test_a_pickle_in_an_array_is_not_executed(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return Path.touch, (tmp_path / "executed",)  # type: ignore[return-value]

    found = arrays() | {"b_enc": np.array([Trap()] * D_SAE, dtype=object)}
    with pytest.raises(UserError, match="b_enc holds object"):
        formats.read(write(tmp_path / "sae", found))
    assert not (tmp_path / "executed").exists()
    (tmp_path / "sae" / "params.npz").write_bytes(pickle.dumps([1]))
    with pytest.raises(UserError, match="is damaged"):
        formats.read(tmp_path / "sae")


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (D_IN, 2**19)})
    folder = write(tmp_path / "sae", arrays())
    with zipfile.ZipFile(folder / "params.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        shapes = {"W_enc": (D_IN, 2**19), "W_dec": (2**19, D_IN), "b_dec": (D_IN,), "b_enc": (2**19,)}
        for name, shape in (shapes | {"threshold": (2**19,)}).items():
            content = io.BytesIO()
            np.save(content, np.zeros(shape, np.float32))
            archive.writestr(f"{name}.npy", content.getvalue())
    with pytest.raises(UserError, match="must not unpack to more than 20 times its size"):
        formats.read(folder)
    with zipfile.ZipFile(folder / "params.npz", "w") as archive:
        archive.writestr("W_enc.npy", header.getvalue())
    with pytest.raises(UserError, match="does not have the size that its header states"):
        formats.read(folder)


@pytest.mark.parametrize("archives", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_damaged_archives_give_a_clear_error(archives: int, tmp_path: Path) -> None:
    """Archives with changed or missing bytes load or give a clear error."""
    generator, loaded = random.Random(0), 0
    folder = write(tmp_path / "sae", arrays())
    path = folder / "params.npz"
    np.savez_compressed(tmp_path / "packed.npz", **arrays())
    whole = [path.read_bytes(), (tmp_path / "packed.npz").read_bytes()]
    for _ in range(archives):
        content = bytearray(generator.choice(whole))
        kind = generator.randrange(4)
        if kind == 0:
            content = content[: generator.randrange(len(content))]
        elif kind == 1:  # the directory of the archive
            for _ in range(generator.choice([1, 3])):
                content[-generator.randrange(1, 400)] = generator.randrange(256)
        else:  # the headers of the first array
            for _ in range(generator.choice([1, 3, 20])):
                content[generator.randrange(200)] = generator.randrange(256)
        path.write_bytes(content)
        try:
            formats.read(folder)
            loaded += 1
        except UserError:
            pass
    assert 0 < loaded < archives / 2
