"""Common fixtures: no network, a fixed seed, warmed-up vector maths, tiny models."""

from __future__ import annotations

import os
import shlex

# Before anything imports huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
# Before anything imports torch: waiting threads sleep instead of spinning. Test processes run side by side, and a
# thread that spins takes the core from the one it waits for.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from jaxtyping import install_import_hook

# Shape annotations of the core are checked while tests run; before the first import of it. An int passes for a float.
install_import_hook("kronsae.core", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

from kronsae.support.vector_math import warm_up  # noqa: E402

warm_up()

# pytest's importlib mode puts nothing on the path; tests.tiny_models is imported from the root.
sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.tiny_models import KINDS, make_tiny_model  # noqa: E402

if TYPE_CHECKING:
    from tests.command_line import Outcome
    from tests.hub_stand_in import Hub

    from kronsae.data.named_models import NamedModel
    from kronsae.runs.config import RunConfig
    from kronsae.runs.run import Run


def pytest_collection_finish() -> None:
    """Exclude the objects created by imports and collection from later garbage collections; they are never freed."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of this test session: what the person has in the real one is neither used nor touched."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["KRONSAE_CACHE"] = str(folder)
    return folder


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test alone, not made yet."""
    monkeypatch.setenv("KRONSAE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of `tests.tiny_models.make_gguf_model` as a GGUF file, unquantised."""
    from tests.tiny_models import write_gguf

    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def stand_in(tmp_path: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[NamedModel, Path]:
    """A tiny model in the place of SmolLM2 (as `NamedModel`), and its wheel."""
    from tests.tiny_models import make_wheel

    from kronsae.data.named_models import NAMED

    (tmp_path / "wheels").mkdir()
    model, wheel = make_wheel(tmp_path / "wheels", gguf_file)
    monkeypatch.setitem(NAMED, model.name, model)
    return model, wheel


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that maps an architecture's name (``tiny_models.KINDS``) to the folder of a tiny model."""
    folders: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = make_tiny_model(kind, tmp_path_factory.mktemp(kind))
        return folders[kind]

    return folder


@pytest.fixture(params=KINDS)
def any_model_folder(request: pytest.FixtureRequest, tiny_model_folder: Callable[[str], Path]) -> Path:
    """Return each of the six architectures in turn."""
    return tiny_model_folder(request.param)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a ``.jsonl`` file of small documents, some of which are held out."""
    from tests.tiny_runs import write_jsonl

    return write_jsonl(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="session")
def finished_run(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Callable[[str], Path], text_file: Path
) -> Run:
    """Return a finished, never interrupted run of `tests.tiny_runs.tiny_config`, which tests must not change."""
    from tests.tiny_runs import tiny_config

    from kronsae.runs.run import execute

    config = tiny_config(tiny_model_folder("gpt_neox"), text_file)
    return execute(config, tmp_path_factory.mktemp("runs") / "whole", show_progress=False)


@pytest.fixture
def config(tiny_model_folder: Callable[[str], Path], text_file: Path) -> RunConfig:
    """Return the config of `finished_run`."""
    from tests.tiny_runs import tiny_config

    return tiny_config(tiny_model_folder("gpt_neox"), text_file)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A stand-in of the Hugging Face Hub for ``huggingface_hub``, with a token and an empty cache of this test."""
    from huggingface_hub import close_session, constants
    from tests.hub_stand_in import TOKEN, serve

    with serve() as stand_in:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
        monkeypatch.setattr(constants, "ENDPOINT", stand_in.url)
        template = stand_in.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield stand_in
        close_session()


@pytest.fixture
def kronsae(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Return a function that calls the entry point like the ``kronsae`` script; arguments are converted to strings."""
    from tests.command_line import Outcome

    from kronsae.cli.main import main

    def run(*words: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["kronsae", *map(str, words)])
        capsys.readouterr()
        status: object = 0
        try:
            main()
        except SystemExit as end:
            status = end.code
        captured = capsys.readouterr()
        assert isinstance(status, int)
        return Outcome(status, captured.out, captured.err)

    return run


@pytest.fixture
def base(tiny_model_folder: Callable[[str], Path], text_file: Path) -> list[str]:
    """Return a valid ``train`` command line without ``--out`` and ``--sae``."""
    line = (
        f"train --model {tiny_model_folder('gpt_neox')} --text {text_file} --hook layers.2 --tokens 256 --quiet "
        "--set context_length=32 --set loop.batch_tokens=64 --set buffer_tokens=128 --set held_out_share=0.2 "
        "--set eval_tokens=100 --set model.device=cpu"
    )
    return shlex.split(line)
