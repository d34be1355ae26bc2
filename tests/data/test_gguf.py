"""GGUF files: what is in the cache is what is in the file, made once, checked, and loaded like any folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf as packages_gguf
import pytest
import torch
from tests.tiny_models import POSITIONS, TEXT, gguf_weights, make_gguf_model, make_tokenizer, write_gguf

from kronsae.data import gguf
from kronsae.data.harvest import hidden_states
from kronsae.data.model import LanguageModel, ModelConfig, load_model, origin, resolve_hook
from kronsae.data.tokens import TokenBatch
from kronsae.support.errors import UserError


def load(path: Path, **options: Any) -> LanguageModel:
    return load_model(ModelConfig(name=str(path), device="cpu", **options))


def entries(cache: Path) -> list[Path]:
    return sorted(path for path in (cache / "dequantised").iterdir() if not path.name.startswith("."))


def weights_of(language_model: LanguageModel) -> dict[str, torch.Tensor]:
    return dict(language_model.model.named_parameters())


class TestContent:
    def test_weights_tokens_and_head_are_those_of_the_file(self, gguf_file: Path) -> None:
        language_model = load(gguf_file)
        found, expected = weights_of(language_model), dict(make_gguf_model().named_parameters())
        assert found.keys() == expected.keys()
        assert [name for name in found if not torch.equal(found[name], expected[name])] == []
        for text in TEXT:
            ids = [made(text, add_special_tokens=False).input_ids for made in (language_model.tokenizer, _tokenizer())]
            assert ids[0] == ids[1]
        assert (language_model.tokenizer.bos_token, language_model.tokenizer.eos_token) == ("<s>", "</s>")
        assert language_model.no_lm_head_reason == ""
        assert language_model.max_positions == POSITIONS
        assert language_model.name == str(gguf_file)

    def test_quantised_matrices_are_what_their_blocks_stand_for(self, tmp_path: Path, own_cache: Path) -> None:
        language_model = load(write_gguf(tmp_path / "q.gguf", quantized=True))
        kind = packages_gguf.GGMLQuantizationType.Q4_1
        original = gguf_weights(make_gguf_model())
        for name, weight in gguf_weights(language_model.model).items():
            if weight.ndim == 2:
                blocks = packages_gguf.quants.quantize(original[name].numpy(), kind)
                expected = torch.from_numpy(packages_gguf.quants.dequantize(blocks, kind))
                # one multiplication and one addition per weight in float32, of values below 0.1
                torch.testing.assert_close(weight, expected, rtol=0, atol=1e-8)
                assert not torch.equal(weight, original[name])

    def test_another_dtype_is_of_the_model_not_of_the_cache(self, gguf_file: Path, cache: Path) -> None:
        load(gguf_file)
        before = entries(cache)
        language_model = load(gguf_file, dtype="bfloat16")
        assert entries(cache) == before
        found = weights_of(language_model)["lm_head.weight"]
        expected: Any = make_gguf_model()
        assert torch.equal(found, expected.lm_head.weight.to(torch.bfloat16))

    def test_hooks_are_those_of_its_architecture(self, gguf_file: Path) -> None:
        language_model = load(gguf_file)
        assert resolve_hook(language_model.model, "layers.1.mlp").path == "model.layers.1.mlp"
        ids = torch.arange(10).reshape(2, 5)
        batch = TokenBatch(
            input_ids_ST=ids,
            attention_mask_ST=torch.ones_like(ids),
            keep_ST=torch.ones_like(ids, dtype=torch.bool),
            documents=("a", "b"),
            offsets=(0, 0),
        )
        found = hidden_states(language_model, ["layers.0"], batch)["layers.0"]
        with torch.no_grad():
            expected = make_gguf_model().eval()(ids, output_hidden_states=True).hidden_states[1]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


class TestFinding:
    def test_a_folder_with_one(self, gguf_file: Path, tmp_path: Path) -> None:
        shutil.copy(gguf_file, tmp_path / "any.GGUF")
        (tmp_path / "README.md").write_text("about")
        assert load(tmp_path).has_lm_head

    def test_a_folder_with_several(self, tmp_path: Path) -> None:
        for name in ("b", "a", "c"):
            (tmp_path / f"{name}.gguf").write_bytes(b"")
        with pytest.raises(
            UserError,
            match=r"must hold one GGUF file; it holds a\.gguf, b\.gguf and c\.gguf\. Give the path of one of them\.$",
        ):
            load(tmp_path)

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"^model: there is no file '.*none\.gguf'\. Check the path"):
            load(tmp_path / "none.gguf")
        with pytest.raises(UserError, match=r"^model: there is no file 'none\.gguf'\. Check the path"):
            load(Path("none.gguf"))

    def test_a_file_of_another_kind(self, tmp_path: Path) -> None:
        (tmp_path / "model.bin").write_bytes(b"")
        with pytest.raises(UserError, match=r"^model: there is no folder '.*model\.bin'"):
            load(tmp_path / "model.bin")

    def test_a_folder_in_hugging_face_layout_is_read_as_that(
        self, gguf_file: Path, tmp_path: Path, own_cache: Path
    ) -> None:
        make_gguf_model(seed=1).save_pretrained(tmp_path)
        _tokenizer().save_pretrained(tmp_path)
        shutil.copy(gguf_file, tmp_path)
        expected: Any = make_gguf_model(seed=1)
        assert torch.equal(weights_of(load(tmp_path))["lm_head.weight"], expected.lm_head.weight)
        assert not own_cache.exists()

    def test_a_revision_says_nothing_of_a_file(self, gguf_file: Path) -> None:
        with pytest.raises(UserError, match=r"^revision is for models of the Hugging Face Hub; got 'v1'"):
            load(gguf_file, revision="v1")

    @pytest.mark.parametrize("keep", [0, 3, 100, -5000])
    def test_a_file_that_is_not_whole(self, keep: int, gguf_file: Path, tmp_path: Path, own_cache: Path) -> None:
        (tmp_path / "cut.gguf").write_bytes(gguf_file.read_bytes()[:keep])
        with pytest.raises(
            UserError, match=r"^model: '.*cut\.gguf' (must be a whole GGUF file|cannot be loaded)"
        ) as it:
            load(tmp_path / "cut.gguf")
        assert "\n" not in str(it.value)
        assert not own_cache.exists() or entries(own_cache) == []

    def test_an_architecture_that_transformers_cannot_read(self, tmp_path: Path, own_cache: Path) -> None:
        writer = packages_gguf.GGUFWriter(tmp_path / "odd.gguf", "no-such-architecture")
        writer.add_name("odd")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(UserError, match=r"odd\.gguf' cannot be loaded: .*no-such-architecture"):
            load(tmp_path / "odd.gguf")


class TestCache:
    def test_it_is_made_once_and_said_so(
        self, gguf_file: Path, own_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        load(gguf_file)
        out, err = capsys.readouterr()
        (entry,) = entries(own_cache)
        assert out == ""
        assert err == f"Dequantising tiny.gguf to float32, once: 0.15 MB in {entry}\n"
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in entry.iterdir()}
        shutil.copy(gguf_file, tmp_path / "other-name.gguf")  # addressed by content
        load(tmp_path / "other-name.gguf")
        assert capsys.readouterr() == ("", "")
        assert entries(own_cache) == [entry]

    def test_another_file_of_the_same_name_has_its_own(self, tmp_path: Path, own_cache: Path) -> None:
        one = load(write_gguf(tmp_path / "m.gguf"))
        (tmp_path / "m.gguf").unlink()
        other = load(write_gguf(tmp_path / "m.gguf", seed=1))
        assert len(entries(own_cache)) == 2
        assert not torch.equal(weights_of(one)["lm_head.weight"], weights_of(other)["lm_head.weight"])

    def test_other_versions_have_their_own(
        self, gguf_file: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = gguf.dequantised(gguf_file)
        monkeypatch.setattr(gguf, "version", lambda package: "0.0.1")
        assert gguf.dequantised(gguf_file) != first

    def test_a_damaged_one_is_made_again(self, gguf_file: Path, own_cache: Path) -> None:
        load(gguf_file)
        (entry,) = entries(own_cache)
        whole = (entry / "model.safetensors").read_bytes()
        (entry / "model.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        load(gguf_file)
        assert (entry / "model.safetensors").read_bytes() == whole
        (entry / "tokenizer.json").unlink()
        load(gguf_file)
        assert entries(own_cache) == [entry]

    @pytest.mark.slow
    def test_two_processes_at_once(self, gguf_file: Path, own_cache: Path) -> None:
        script = (
            "import sys; from kronsae.data.model import load_model, ModelConfig\n"
            "print(load_model(ModelConfig(name=sys.argv[1], device='cpu')).has_lm_head)"
        )
        command = [sys.executable, "-c", script, str(gguf_file)]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        at_work = [subprocess.Popen(command, **pipes) for _ in range(2)]
        ends = [process.communicate(timeout=250) for process in at_work]
        assert [out for out, _ in ends] == ["True\n"] * 2, ends
        assert sum(err.count("Dequantising") for _, err in ends) == 1
        assert len(entries(own_cache)) == 1

    def test_a_disk_that_is_too_full(self, gguf_file: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("kronsae.support.resources.free_disk_bytes", lambda folder: 10)
        with pytest.raises(UserError, match=r"^the dequantised model must fit on the disk; .* set KRONSAE_CACHE"):
            load(gguf_file)


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ({"gguf"}, "gguf is not installed"),
        ({"accelerate"}, "accelerate is not installed"),
        ({"gguf", "accelerate"}, "gguf and accelerate are not installed"),
    ],
)
def test_missing_packages_are_named(
    missing: set[str], words: str, gguf_file: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "find_spec", lambda name: None if name in missing else object())
    with pytest.raises(UserError, match=r"^model: ") as caught:
        load(gguf_file)
    assert str(caught.value) == (
        f"model: reading GGUF files such as 'tiny.gguf' takes gguf and accelerate; {words}. "
        "Run pip install 'kronsae[gguf]'."
    )


def test_what_a_file_was_can_be_told(gguf_file: Path) -> None:
    about = origin(str(gguf_file))
    assert about == {"file": "tiny.gguf", "sha256": gguf.digest(gguf_file)}
    assert origin(str(gguf_file.parent)) == about
    assert len(about["sha256"]) == 64
    assert origin("bundled") == origin("some/model") == {}


def test_the_cached_config_is_json_without_code(gguf_file: Path) -> None:
    config = json.loads((gguf.dequantised(gguf_file) / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert "auto_map" not in config


def _tokenizer() -> Any:
    return make_tokenizer("llama")
