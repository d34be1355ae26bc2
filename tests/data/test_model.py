from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny_models import BLOCKS, CAUSAL_KINDS, KINDS, LAYERS, POSITIONS, VOCABULARY, WIDTH, make_model
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, T5Config, T5ForConditionalGeneration
from transformers.utils import logging

from kronsae import bundled
from kronsae.data import hub
from kronsae.data.harvest import forward
from kronsae.data.model import HookPoint, LanguageModel, ModelConfig, load_model, resolve_hook, tap
from kronsae.data.tokens import TokenBatch
from kronsae.support.errors import UserError

FolderOf = Callable[[str], Path]


def load(folder: Path | str, **options: Any) -> LanguageModel:
    return load_model(ModelConfig(name=str(folder), device="cpu", **options))


def batch_of(shape: tuple[int, int] = (2, 8)) -> TokenBatch:
    return TokenBatch(
        input_ids_ST=torch.randint(VOCABULARY, shape),
        attention_mask_ST=torch.ones(shape, dtype=torch.int64),
        keep_ST=torch.ones(shape, dtype=torch.bool),
        documents=("a",) * shape[0],
        offsets=(0,) * shape[0],
    )


def copy_of(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to, dirs_exist_ok=True)
    return to


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class TestLoading:
    @pytest.mark.parametrize("kind", KINDS)
    def test_every_architecture_loads_with_its_weights(self, kind: str, tiny_model_folder: FolderOf) -> None:
        language_model = load(tiny_model_folder(kind))
        expected = dict(make_model(kind).named_parameters())
        found = dict(language_model.model.named_parameters())
        for name, parameter in found.items():
            if "pooler" not in name:
                assert torch.equal(parameter, expected.get(name, expected.get(f"bert.{name}", torch.empty(0)))), name
        assert not language_model.model.training
        assert not any(parameter.requires_grad for parameter in found.values())
        assert language_model.max_positions == POSITIONS
        assert language_model.device == torch.device("cpu")

    @pytest.mark.parametrize("kind", CAUSAL_KINDS)
    def test_a_causal_language_model_has_its_head(self, kind: str, tiny_model_folder: FolderOf) -> None:
        language_model = load(tiny_model_folder(kind))
        assert language_model.has_lm_head
        assert language_model.no_lm_head_reason == ""
        assert forward(language_model, batch_of()).logits.shape == (2, 8, VOCABULARY)

    def test_an_encoder_says_why_it_has_no_head(self, tiny_model_folder: FolderOf) -> None:
        language_model = load(tiny_model_folder("bert"))
        assert not language_model.has_lm_head
        assert language_model.no_lm_head_reason == (
            "the checkpoint is BertForMaskedLM, which has no head for the next token"
        )
        assert forward(language_model, batch_of()).last_hidden_state.shape == (2, 8, WIDTH)

    def test_a_decoder_saved_without_its_head_says_so(self, tmp_path: Path, tiny_model_folder: FolderOf) -> None:
        folder = copy_of(tiny_model_folder("gpt2"), tmp_path)
        model: Any = make_model("gpt2")
        model.transformer.save_pretrained(folder)
        language_model = load(folder)
        assert language_model.no_lm_head_reason == ("the checkpoint is GPT2Model, which has no head for the next token")

    @pytest.mark.parametrize("kind", KINDS)
    def test_without_named_architectures_the_type_tells(
        self, kind: str, tmp_path: Path, tiny_model_folder: FolderOf
    ) -> None:
        folder = copy_of(tiny_model_folder(kind), tmp_path)
        change_json(folder / "config.json", architectures=None)
        language_model = load(folder)
        if kind == "bert":  # transformers has a causal BERT too, but it is an encoder
            assert language_model.no_lm_head_reason == (
                "the checkpoint is an unnamed architecture of type bert, which has no head for the next token"
            )
            assert forward(language_model, batch_of()).last_hidden_state.shape == (2, 8, WIDTH)
        else:
            assert language_model.no_lm_head_reason == ""
            expected = load(tiny_model_folder(kind))
            batch = batch_of()
            assert torch.equal(forward(language_model, batch).logits, forward(expected, batch).logits)

    def test_without_named_architectures_and_without_a_head(self, tmp_path: Path, tiny_model_folder: FolderOf) -> None:
        folder = copy_of(tiny_model_folder("llama"), tmp_path)
        model: Any = make_model("llama")
        model.model.save_pretrained(folder)
        change_json(folder / "config.json", architectures=None)
        language_model: Any = load(folder)
        assert language_model.no_lm_head_reason == "the checkpoint has no weights of a head for the next token"
        assert torch.equal(language_model.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)

    def test_without_named_architectures_missing_weights_are_still_an_error(
        self, tmp_path: Path, tiny_model_folder: FolderOf
    ) -> None:
        folder = copy_of(tiny_model_folder("llama"), tmp_path)
        change_json(folder / "config.json", architectures=None)
        weights = load_file(folder / "model.safetensors")
        weights.pop("model.layers.2.mlp.up_proj.weight")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=r"must be complete; 1 are missing or misshapen, such as model\.layers\.2"):
            load(folder)

    @pytest.mark.parametrize("kind", ["gpt2", "llama"])  # tied weights, and not
    def test_weights_are_the_model_s_own(self, kind: str, tmp_path: Path, tiny_model_folder: FolderOf) -> None:
        folder = copy_of(tiny_model_folder(kind), tmp_path)
        language_model = load(folder)
        before = {name: tensor.clone() for name, tensor in language_model.model.state_dict().items()}
        with (folder / "model.safetensors").open("r+b") as file:  # a mapped weight would become 0
            file.write(bytes(folder.joinpath("model.safetensors").stat().st_size))
        after = language_model.model.state_dict()
        assert [name for name in before if not torch.equal(before[name], after[name])] == []
        weights: Any = language_model.model
        tied = weights.get_input_embeddings().weight is weights.get_output_embeddings().weight
        assert tied == (kind == "gpt2")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_the_dtype_is_as_asked_for(self, dtype: torch.dtype, tiny_model_folder: FolderOf) -> None:
        language_model = load(tiny_model_folder("llama"), dtype=str(dtype).removeprefix("torch."))
        assert {parameter.dtype for parameter in language_model.model.parameters()} == {dtype}

    def test_loading_says_nothing_and_changes_no_setting(
        self, tiny_model_folder: FolderOf, capfd: pytest.CaptureFixture[str]
    ) -> None:
        settings: Any = logging
        before = settings.get_verbosity(), settings.is_progress_bar_enabled()
        with warnings.catch_warnings(record=True) as caught:
            load(tiny_model_folder("bert"))
        assert not caught
        assert capfd.readouterr() == ("", "")
        assert (settings.get_verbosity(), settings.is_progress_bar_enabled()) == before

    @pytest.mark.skipif(not (bundled.path() / "config.json").is_file(), reason="the bundled model is not trained yet")
    def test_the_bundled_model_loads_like_any_other(self) -> None:
        language_model = load("bundled")
        assert language_model.has_lm_head
        assert language_model.tokenizer.bos_token is not None

    def test_positions_reserved_for_padding_do_not_count(self, tmp_path: Path, tiny_model_folder: FolderOf) -> None:
        from transformers import RobertaConfig, RobertaModel

        folder = copy_of(tiny_model_folder("bert"), tmp_path)
        size: dict[str, Any] = {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
        }
        config = RobertaConfig(vocab_size=VOCABULARY, max_position_embeddings=34, pad_token_id=1, **size)
        RobertaModel(config).save_pretrained(folder)
        language_model = load(folder)
        assert language_model.max_positions == 32
        forward(language_model, batch_of((1, 32)))


class TestUnusableModels:
    @pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "~/no-such-folder", "a/b/c"])
    def test_a_folder_that_does_not_exist(self, name: str) -> None:
        with pytest.raises(UserError, match=rf"model: there is no folder '{name}'\. Check the path"):
            load(name)

    def test_a_folder_without_a_model(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"must hold a Hugging Face model; it has no config\.json"):
            load(tmp_path)

    def test_a_name_without_network(self) -> None:
        with pytest.raises(
            UserError,
            match=r"model: there is no folder and no cached model 'some/model', and the Hugging Face Hub cannot be "
            r"reached \(.*\)\. Check the name and the network, or give a local folder\.",
        ) as caught:
            load("some/model")
        assert "\n" not in str(caught.value)

    def test_a_name_that_cannot_be_one(self) -> None:
        with pytest.raises(UserError, match=r"'no such name' is neither a local path that exists nor a possible Hub"):
            load("no such name")

    @pytest.mark.parametrize(
        ("error", "message"),
        [
            ("RepositoryNotFoundError", r"the Hugging Face Hub has no public model of that name"),
            ("GatedRepoError", r"is gated on the Hugging Face Hub\. Ask for access on its page"),
            ("RevisionNotFoundError", r"has no such revision of 'some/model'\. Check revision\."),
        ],
    )
    def test_what_the_hub_answers(self, error: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
        import huggingface_hub
        from huggingface_hub import errors

        def answer(*args: object, **options: object) -> None:
            kind: type[Exception] = getattr(errors, error)
            raise kind.__new__(kind)  # its constructor takes a response of whatever HTTP library is in use

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", answer)
        with pytest.raises(UserError, match=message):
            load("some/model")

    def test_a_cached_model_is_used_without_network(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **options: "/cache/config.json")
        assert hub.check_model("some/model", None) is True

    def test_missing_weights(self, tmp_path: Path, tiny_model_folder: FolderOf) -> None:
        folder = copy_of(tiny_model_folder("llama"), tmp_path)
        weights = load_file(folder / "model.safetensors")
        weights.pop("model.layers.2.mlp.up_proj.weight")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(
            UserError, match=r"must be complete; 1 are missing or misshapen, such as model\.layers\.2\.mlp\.up_proj"
        ):
            load(folder)

    def test_damaged_weights(self, tmp_path: Path, tiny_model_folder: FolderOf) -> None:
        folder = copy_of(tiny_model_folder("llama"), tmp_path)
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match=r"cannot be loaded: ") as caught:
            load(folder)
        assert "\n" not in str(caught.value)

    def test_misshapen_weights(self, tmp_path: Path, tiny_model_folder: FolderOf) -> None:
        folder = copy_of(tiny_model_folder("llama"), tmp_path)
        change_json(folder / "config.json", intermediate_size=48)
        with pytest.raises(UserError, match=r"model: .*(misshapen|cannot be loaded)"):
            load(folder)

    @pytest.mark.parametrize("kind", ["gpt2", "bert", "llama"])
    def test_a_missing_tokenizer(self, kind: str, tmp_path: Path, tiny_model_folder: FolderOf) -> None:
        folder = copy_of(tiny_model_folder(kind), tmp_path)
        for file in folder.glob("*token*"):
            file.unlink()
        with pytest.raises(UserError, match=r"must come with its tokenizer, and has no usable one \("):
            load(folder)

    def test_an_encoder_decoder(self, tmp_path: Path) -> None:
        config = T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
        T5ForConditionalGeneration(config).save_pretrained(tmp_path)
        with pytest.raises(UserError, match=r"must be a causal language model or an encoder; .* encoder-decoder"):
            load(tmp_path)

    def test_an_unknown_architecture(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
        with pytest.raises(UserError, match=r"cannot be loaded: ") as caught:
            load(tmp_path)
        assert "\n" not in str(caught.value)

    def test_options_are_checked(self) -> None:
        with pytest.raises(UserError, match=r"dtype must be one of .*; got 'float61'\. Did you mean 'float16'\?"):
            ModelConfig(dtype="float61")
        with pytest.raises(UserError, match=r"model must name a model; got ''"):
            ModelConfig(name="")

    @pytest.mark.parametrize("device", ["cuda:99", "gpu", ""])
    def test_an_unknown_device(self, device: str, tiny_model_folder: FolderOf) -> None:
        with pytest.raises(UserError, match=rf"device must be one that this machine .* have; got '{device}'"):
            load_model(ModelConfig(name=str(tiny_model_folder("gpt2")), device=device))


class TestHostileModels:
    @pytest.fixture
    def marker(self, tmp_path: Path) -> Path:
        return tmp_path / "ran"

    def hostile(self, folder: Path, marker: Path) -> Path:
        source = f"open({str(marker)!r}, 'w')\nfrom transformers import *\nclass Evil(GPT2Config): pass\n"
        (folder / "evil.py").write_text(source)
        mapping = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoModel": "evil.Evil"}
        change_json(folder / "config.json", auto_map=mapping)
        change_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
        return folder

    def test_code_beside_a_known_architecture_is_not_run(
        self, tmp_path: Path, marker: Path, tiny_model_folder: FolderOf
    ) -> None:
        folder = self.hostile(copy_of(tiny_model_folder("gpt2"), tmp_path / "model"), marker)
        assert isinstance(load(folder).model, GPT2LMHeadModel)
        assert not marker.exists()

    def test_an_architecture_that_needs_its_own_code_is_refused(
        self, tmp_path: Path, marker: Path, tiny_model_folder: FolderOf
    ) -> None:
        folder = self.hostile(copy_of(tiny_model_folder("gpt2"), tmp_path / "model"), marker)
        change_json(folder / "config.json", model_type="evil", architectures=["Evil"])
        with pytest.raises(UserError, match=r"needs code of its own, and code that comes with a model is never run"):
            load(folder)
        assert not marker.exists()

    def test_pickled_weights_are_not_read(self, tmp_path: Path, marker: Path, tiny_model_folder: FolderOf) -> None:
        class Evil:
            def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
                return open, (str(marker), "w")

        folder = copy_of(tiny_model_folder("gpt2"), tmp_path / "model")
        (folder / "model.safetensors").unlink()
        torch.save({"weight": Evil()}, folder / "pytorch_model.bin")
        with pytest.raises(UserError, match=r"has no safetensors weights, and pickled ones are never read"):
            load(folder)
        assert not marker.exists()


class TestHooks:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("layer", [0, LAYERS - 1])
    def test_every_name_of_a_block_is_the_block(self, kind: str, layer: int, tiny_model_folder: FolderOf) -> None:
        model = load(tiny_model_folder(kind)).model
        path = f"{BLOCKS[kind]}.{layer}"
        own_name = ".".join(path.split(".")[-2:])
        for hook in (layer, str(layer), f"layers.{layer}", own_name, path):
            assert resolve_hook(model, hook).path == path
            assert resolve_hook(model, hook).module is model.get_submodule(path)

    def test_modules_within_a_block(self, tiny_model_folder: FolderOf) -> None:
        model = load(tiny_model_folder("gpt2")).model
        assert resolve_hook(model, "layers.1.mlp").path == "transformer.h.1.mlp"
        assert resolve_hook(model, "h.1.mlp.c_fc").path == "transformer.h.1.mlp.c_fc"
        assert resolve_hook(model, "wte").path == "transformer.wte"

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("hook", [LAYERS, -1, "99", "layers.99", "layers.-1", "layers.99.mlp"])
    def test_a_layer_out_of_range_names_the_range(
        self, kind: str, hook: str | int, tiny_model_folder: FolderOf
    ) -> None:
        model = load(tiny_model_folder(kind)).model
        with pytest.raises(UserError, match=rf"hook must name a layer from 0 to 3; got '{hook}'"):
            resolve_hook(model, hook)

    @pytest.mark.parametrize(
        ("hook", "nearest"),
        [
            ("layer.2", "layers.2"),
            ("layers.2.mpl", "layers.2.mlp"),
            ("gpt_neox.layer.2", "gpt_neox.layers.2"),
            ("embed_inn", "embed_in"),
        ],
    )
    def test_an_unknown_name_names_the_nearest(self, hook: str, nearest: str, tiny_model_folder: FolderOf) -> None:
        model = load(tiny_model_folder("gpt_neox")).model
        message = (
            rf"hook must name a module of the model, such as 'layers\.0'; got '{hook}'\. Did you mean '.*{nearest}'"
        )
        with pytest.raises(UserError, match=message):
            resolve_hook(model, hook)

    def test_an_ambiguous_ending_names_two(self, tiny_model_folder: FolderOf) -> None:
        model = load(tiny_model_folder("gpt2")).model
        with pytest.raises(
            UserError, match=r"'mlp' ends 4 paths, such as transformer\.h\.0\.mlp and transformer\.h\.1"
        ):
            resolve_hook(model, "mlp")

    def test_a_side(self, tiny_model_folder: FolderOf) -> None:
        model = load(tiny_model_folder("gpt2")).model
        given = resolve_hook(model, "layers.1.mlp:input")
        assert (given.path, given.side, given.name) == ("transformer.h.1.mlp", "input", "transformer.h.1.mlp:input")
        for hook in ("layers.1.mlp", "layers.1.mlp:output"):
            point = resolve_hook(model, hook)
            assert (point.path, point.side, point.name) == ("transformer.h.1.mlp", "output", "transformer.h.1.mlp")
        assert resolve_hook(model, "2:input").name == "transformer.h.2:input"
        with pytest.raises(UserError) as error:
            resolve_hook(model, "layers.1.mlp:inputs")
        assert str(error.value) == (
            "hook must end in ':input' or ':output' if it has a ':'; got 'layers.1.mlp:inputs'. Did you mean 'input'?"
        )

    def test_a_model_without_blocks(self) -> None:
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        with pytest.raises(UserError, match=r"hook must name a module of the model"):
            resolve_hook(model, "layers.1")


class TestTap:
    @pytest.mark.parametrize("hook", ["layers.1", "layers.1:input", "layers.1.mlp", "layers.2.mlp:input"])
    @pytest.mark.parametrize("kind", CAUSAL_KINDS)
    def test_the_same_changes_nothing_and_another_does(self, kind: str, hook: str, tiny_model_folder: FolderOf) -> None:
        language_model = load(tiny_model_folder(kind))
        point = resolve_hook(language_model.model, hook)
        batch = batch_of()
        plain = forward(language_model, batch)[0]
        seen: list[Tensor] = []
        with tap(point, seen.append):
            assert torch.equal(forward(language_model, batch)[0], plain)
        with tap(point, lambda hidden_STD: hidden_STD.clone()):
            assert torch.equal(forward(language_model, batch)[0], plain)
        with tap(point, torch.zeros_like):
            assert not torch.allclose(forward(language_model, batch)[0], plain)
        assert torch.equal(forward(language_model, batch)[0], plain)
        assert [hidden_STD.shape for hidden_STD in seen] == [(*batch.input_ids_ST.shape, WIDTH)]

    def test_a_tuple_keeps_its_other_elements(self) -> None:
        class Pair(nn.Module):
            def forward(self, hidden: Tensor) -> tuple[Tensor, str]:
                return hidden, "other"

        module = Pair()
        with tap(HookPoint("pair", module), lambda hidden_STD: hidden_STD.double() + 1):
            hidden, other = module(torch.zeros(1, 2, 3))
        assert torch.equal(hidden, torch.ones(1, 2, 3))
        assert hidden.dtype == torch.float32
        assert other == "other"
        assert torch.equal(module(torch.zeros(1, 2, 3))[0], torch.zeros(1, 2, 3))

    def test_an_input_may_be_given_by_name_and_others_stay(self) -> None:
        class Sum(nn.Module):
            def forward(self, hidden_states: Tensor, add: float = 0.0) -> Tensor:
                return hidden_states + add

        module = Sum()
        with tap(HookPoint("sum", module, "input"), lambda hidden_STD: hidden_STD + 1):
            assert torch.equal(module(torch.zeros(1, 2, 3), 4.0), torch.full((1, 2, 3), 5.0))
            assert torch.equal(module(add=4.0, hidden_states=torch.zeros(1, 2, 3)), torch.full((1, 2, 3), 5.0))
            with pytest.raises(UserError, match=r"one vector per token as input; 'sum:input' gives a tensor of 2 dim"):
                module(torch.zeros(2, 3))
        assert torch.equal(module(torch.zeros(1, 2, 3)), torch.zeros(1, 2, 3))

    @pytest.mark.parametrize("side", ["output", "input"])
    def test_the_shape_must_stay(self, side: str) -> None:
        module = nn.Identity()
        with (
            tap(HookPoint("same", module, side), lambda hidden_STD: hidden_STD[:, :1]),
            pytest.raises(ValueError, match=r"must keep the shape \(1, 2, 3\); got \(1, 1, 3\)"),
        ):
            module(torch.zeros(1, 2, 3))

    @pytest.mark.parametrize("side", ["output", "input"])
    def test_it_is_undone_after_an_error(self, side: str) -> None:
        module = nn.Identity()
        with pytest.raises(RuntimeError, match="stop"), tap(HookPoint("same", module, side), torch.zeros_like):
            raise RuntimeError("stop")
        assert torch.equal(module(torch.ones(1, 2, 3)), torch.ones(1, 2, 3))


def test_the_context_length_is_held_to_the_positions(tiny_model_folder: FolderOf) -> None:
    language_model = load(tiny_model_folder("gpt2"))
    language_model.check_context_length(POSITIONS)
    message = r"context_length must not exceed the 64 positions of model '.*'; got 65\. Give at most 64\."
    with pytest.raises(UserError, match=message):
        language_model.check_context_length(POSITIONS + 1)
    with pytest.raises(UserError, match=message):
        forward(language_model, batch_of((1, POSITIONS + 1)))


def test_tokens_beyond_the_embeddings_are_an_error(tiny_model_folder: FolderOf) -> None:
    language_model = load(tiny_model_folder("gpt2"))
    batch = batch_of()
    batch.input_ids_ST[1, 2] = VOCABULARY
    with pytest.raises(UserError, match=r"token 320 is beyond the 320 embeddings of '.*'"):
        forward(language_model, batch)


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_bfloat16_without_instructions_for_it_is_said_to_be_slow(
    capability: str,
    tiny_model_folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    for dtype in ("float32", "bfloat16"):
        load_model(ModelConfig(name=str(tiny_model_folder("gpt2")), device="cpu", dtype=dtype))
    expected = (
        "The model runs in bfloat16 on a CPU that has no instructions for it, which takes several times as long as "
        "float32 (docs/harvesting.md).\n"
    )
    assert capsys.readouterr().err == (expected if capability == "AVX2" else "")
