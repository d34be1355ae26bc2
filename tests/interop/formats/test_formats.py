"""SAEs of other libraries: the same latents and reconstructions as their formulas, and what is refused."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.interop.foreign_saes import D_IN, D_SAE, K, dictionary_learning, sparsify, wrapped_state_dict
from torch import Tensor

from kronsae.interop import formats
from kronsae.interop.formats import convert
from kronsae.interop.formats.dictionary_learning import CLASSES
from kronsae.interop.formats.foreign import Foreign
from kronsae.support.errors import UserError

TOLERANCE = 1e-5
"""In float32, relative to the largest value."""

CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = {
    "sae": (sparsify, (), {}),
    "sae of bfloat16": (sparsify, (), {"dtype": torch.bfloat16}),
    "transcoder": (sparsify, (), {"transcode": True}),
    "skip transcoder": (sparsify, (), {"transcode": True, "skip_connection": True}),
    "sae with a skip": (sparsify, (), {"skip_connection": True}),
    **{name: (dictionary_learning, (name,), {}) for name in CLASSES},
}


def x_of(tokens: int = 64) -> Tensor:
    return torch.randn(tokens, D_IN, generator=torch.Generator().manual_seed(11))


def difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    return float((found.detach().double() - expected).abs().max() / expected.abs().max())


def read(folder: Path) -> Foreign:
    return formats.read(folder)


def refusal(folder: Path) -> str:
    """Return the error message, with the folder's path replaced by ``SAE``."""
    with pytest.raises(UserError) as error:
        formats.read(folder)
    return str(error.value).replace(str(folder), "SAE")


@pytest.mark.parametrize("case", CASES)
def test_the_same_latents_and_reconstructions(case: str, tmp_path: Path) -> None:
    write, arguments, changes = CASES[case]
    latents, decode = write(tmp_path, *arguments, **changes)
    x = x_of()
    sae = read(tmp_path).sae
    codes = sae.encode(x)
    expected = latents(x)
    assert 0 < int((expected > 0).sum()) < expected.numel()
    assert difference(codes.to_dense(), expected) < TOLERANCE
    assert difference(sae.decode(codes, x), decode(expected, x)) < TOLERANCE
    assert sae.W_dec.dtype == torch.float32


def test_a_wrong_conversion_would_be_seen(tmp_path: Path) -> None:
    """An encoder without the fold of the subtracted bias differs by far more than the tolerance."""
    latents, _ = sparsify(tmp_path)
    sae = read(tmp_path).sae
    with torch.no_grad():
        sae.encoder.bias.copy_(load_file(tmp_path / "sae.safetensors")["encoder.bias"])
    assert difference(sae.encode(x_of()).to_dense(), latents(x_of())) > 1000 * TOLERANCE


class TestSparsify:
    def test_what_it_states(self, tmp_path: Path) -> None:
        folder = tmp_path / "run" / "layers.3.mlp"
        sparsify(folder, transcode=True)
        run = {"hookpoints": ["layers.3.mlp"], "model": "EleutherAI/pythia-160m", "ctx_len": 2048, "dataset": "d"}
        (folder.parent / "config.json").write_text(json.dumps(run))
        found = read(folder)
        assert (found.format, found.architecture, found.model) == ("sparsify", "transcoder", "EleutherAI/pythia-160m")
        assert (found.hook_read, found.hook_write) == ("layers.3.mlp:input", "layers.3.mlp")
        assert found.settings == {"dataset": "d", "ctx_len": 2048}
        assert found.sae.config.role == "transcoder"
        assert found.sae.sparsifier.config.k == K

    @pytest.mark.parametrize("parts", [("layers.10",), ("h.10", "seed1")])
    def test_the_hookpoint_is_the_folder(self, tmp_path: Path, parts: tuple[str, ...]) -> None:
        sparsify(tmp_path.joinpath(*parts))
        found = read(tmp_path.joinpath(*parts))
        assert (found.model, found.hook_read, found.hook_write) == (None, parts[0], None)

    def test_a_folder_of_another_name_states_no_hook(self, tmp_path: Path) -> None:
        sparsify(tmp_path / "mine")
        assert read(tmp_path / "mine").hook_read is None

    def test_an_expansion_factor(self, tmp_path: Path) -> None:
        sparsify(tmp_path, num_latents=0, expansion_factor=32)
        message = refusal(tmp_path)
        assert message.startswith("SAE/sae.safetensors does not fit its config (W_dec: expected (512, 16), found (40, ")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"activation": "groupmax"},
                "SAE/cfg.json: activation must be 'topk'; got 'groupmax'. It keeps the largest latent of each of k "
                "groups, which no sparsifier of kronsae does.",
            ),
            ({"activation": 3}, "SAE/cfg.json: activation must be str; got 3."),
            (
                {"signed": True},
                "SAE/cfg.json: signed=True is not a setting of sparsify 1.3.3, so what it changes is not known. Remove "
                "the key if it only concerns training.",
            ),
            ({"k": "5"}, "SAE/cfg.json: k must be int; got '5'."),
            ({"k": D_SAE + 1}, "k must be at most d_sae; got k=41 with d_sae=40. Lower k or widen."),
            ({"d_in": 10**13}, "SAE/cfg.json: d_in must be at most 1,000,000,000,000; got 10000000000000."),
            ({"num_latents": -1}, "SAE/cfg.json: num_latents or d_in * expansion_factor must be a whole number above"),
            ({"skip_connection": None}, "SAE/cfg.json: skip_connection must be bool; got None."),
        ],
    )
    def test_refused_settings(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        sparsify(tmp_path)
        config = json.loads((tmp_path / "cfg.json").read_text()) | changes
        (tmp_path / "cfg.json").write_text(json.dumps(config))
        assert refusal(tmp_path).startswith(message)

    def test_settings_that_are_off_are_let_through(self, tmp_path: Path) -> None:
        sparsify(tmp_path, signed=False, later=None)
        assert read(tmp_path).sae.d_sae == D_SAE

    def test_weights_of_whole_numbers(self, tmp_path: Path) -> None:
        sparsify(tmp_path)
        tensors = load_file(tmp_path / "sae.safetensors")
        save_file({name: one.long() for name, one in tensors.items()}, tmp_path / "sae.safetensors")
        assert refusal(tmp_path) == ("SAE/sae.safetensors: weights must be of type F64, F32, F16, BF16; got I64.")

    def test_infinite_weights(self, tmp_path: Path) -> None:
        sparsify(tmp_path)
        tensors = load_file(tmp_path / "sae.safetensors")
        tensors["W_dec"][3, 4] = torch.inf
        save_file(tensors, tmp_path / "sae.safetensors")
        assert refusal(tmp_path) == "SAE: weights must be finite in float32; decoder.W_dec holds NaN or infinity."


class Payload:
    """A pickled object that would create a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


class TestDictionaryLearning:
    def test_what_it_states(self, tmp_path: Path) -> None:
        dictionary_learning(tmp_path, "AutoEncoderTopK")
        found = read(tmp_path)
        assert (found.format, found.architecture) == ("dictionary_learning", "AutoEncoderTopK")
        assert (found.model, found.hook_read, found.hook_write) == ("EleutherAI/pythia-70m", "layers.2", None)
        assert found.settings["ctx_len"] == 32

    @pytest.mark.parametrize("name", [None, "mlp_3", 7])
    def test_another_submodule_states_no_hook(self, tmp_path: Path, name: object) -> None:
        dictionary_learning(tmp_path, "AutoEncoder", submodule_name=name)
        assert read(tmp_path).hook_read is None

    def test_l0_of_thresholds(self, tmp_path: Path) -> None:
        dictionary_learning(tmp_path, "BatchTopKSAE")
        assert read(tmp_path).sae.sparsifier.config.k == K
        dictionary_learning(tmp_path, "JumpReluAutoEncoder", target_l0=12.4)
        assert read(tmp_path).sae.sparsifier.config.k == 12
        dictionary_learning(tmp_path, "AutoEncoder")
        assert read(tmp_path).sae.sparsifier.config.k == D_SAE  # not stated: 64, but there are only 40

    @pytest.mark.parametrize("wrap", [OrderedDict, wrapped_state_dict])
    def test_other_kinds_of_state_dicts(self, tmp_path: Path, wrap: Callable[[Any], Any]) -> None:
        latents, _ = dictionary_learning(tmp_path, "BatchTopKSAE")
        torch.save(wrap(torch.load(tmp_path / "ae.pt", weights_only=True)), tmp_path / "ae.pt")
        assert difference(read(tmp_path).sae.encode(x_of()).to_dense(), latents(x_of())) < TOLERANCE

    def test_the_state_dict_of_a_module(self, tmp_path: Path) -> None:
        """``state_dict()`` of a module carries the versions of its modules as an attribute."""
        dictionary_learning(tmp_path, "AutoEncoderNew")
        module = torch.nn.ModuleDict({"encoder": torch.nn.Linear(D_IN, D_SAE), "decoder": torch.nn.Linear(D_SAE, D_IN)})
        torch.save(module.state_dict(), tmp_path / "ae.pt")
        expected = module["decoder"](module["encoder"](x_of()).relu()).detach().double()
        assert difference(read(tmp_path).sae(x_of()), expected) < TOLERANCE

    def test_an_older_topk_without_a_threshold(self, tmp_path: Path) -> None:
        latents, _ = dictionary_learning(tmp_path, "AutoEncoderTopK")
        state = torch.load(tmp_path / "ae.pt", weights_only=True)
        torch.save({name: state[name] for name in state if name not in ("k", "threshold")}, tmp_path / "ae.pt")
        assert difference(read(tmp_path).sae.encode(x_of()).to_dense(), latents(x_of())) < TOLERANCE

    def test_an_older_batch_topk_without_a_threshold_is_refused(self, tmp_path: Path) -> None:
        dictionary_learning(tmp_path, "BatchTopKSAE")
        state = torch.load(tmp_path / "ae.pt", weights_only=True)
        del state["threshold"]
        torch.save(state, tmp_path / "ae.pt")
        assert "missing: threshold; surplus: none." in refusal(tmp_path)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"dict_class": "AutoEncoderTopk"}, "SAE/config.json: trainer.dict_class must be one of AutoEncoder, "),
            ({"dict_class": "CrossCoder"}, "SAE/config.json: trainer.dict_class must be one of AutoEncoder, "),
            ({"dict_class": "AutoEncoder"}, "SAE/ae.pt must hold the tensors of AutoEncoder, encoder.weight, "),
            ({"dict_size": 41}, "SAE/config.json: trainer.dict_size must be that of ae.pt, 40; got 41."),
            ({"activation_dim": 1}, "SAE/config.json: trainer.activation_dim must be that of ae.pt, 16; got 1."),
            ({"k": 4}, "SAE/ae.pt has k=5, and SAE/config.json has k=4. One of the two was changed."),
            ({"k": 0}, "SAE/config.json: trainer.k must be a whole number above 0; got 0."),
        ],
    )
    def test_refused_settings(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        dictionary_learning(tmp_path, "AutoEncoderTopK", **changes)
        assert refusal(tmp_path).startswith(message)

    def test_nothing_is_executed(self, tmp_path: Path) -> None:
        dictionary_learning(tmp_path, "AutoEncoderTopK")
        torch.save({"encoder.weight": Payload(tmp_path / "made")}, tmp_path / "ae.pt")
        assert refusal(tmp_path) == (
            "the SAE: SAE/ae.pt is damaged (its pickle holds a reference to io.open; a state dict holds only tensors). "
            "Save or download it again."
        )
        assert not (tmp_path / "made").exists()

    def test_a_whole_module_is_refused(self, tmp_path: Path) -> None:
        dictionary_learning(tmp_path, "AutoEncoderTopK")
        torch.save(torch.nn.Linear(2, 2), tmp_path / "ae.pt")
        assert "its pickle holds a reference to torch.nn.modules.linear.Linear" in refusal(tmp_path)

    def test_the_older_file_of_torch_save_is_refused(self, tmp_path: Path) -> None:
        dictionary_learning(tmp_path, "AutoEncoderTopK")
        torch.save({"k": torch.ones(1)}, tmp_path / "ae.pt", _use_new_zipfile_serialization=False)
        assert refusal(tmp_path).startswith(
            "the SAE: SAE/ae.pt is damaged (not a zip archive as torch.save writes since version 1.6: "
        )


def test_a_folder_of_no_format(tmp_path: Path) -> None:
    assert formats.recognize(tmp_path) is None
    assert refusal(tmp_path).startswith("SAE must hold an SAE in a known format (")


def test_all_weights_are_on_the_device_of_the_others() -> None:
    """Also the thresholds of a ReLU, which no file holds; ``meta`` stands for an accelerator."""
    with torch.device("meta"):
        parts = torch.empty(D_SAE, D_IN), torch.empty(D_SAE), torch.empty(D_SAE, D_IN), torch.empty(D_IN)
    sae = convert.dense_sae(*parts, convert.thresholds(D_SAE))
    assert {tensor.device.type for tensor in sae.state_dict().values()} == {"meta"}
