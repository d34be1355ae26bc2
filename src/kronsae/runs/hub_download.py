"""Download of one SAE from a Hugging Face Hub repository, in which a stranger may have put anything.

The list of the repository's files is read first, at one commit. Of the chosen folder only the config and the weights of
one format are fetched (kronsae's own, or one of `kronsae.interop.formats`). The config is fetched before the weights:
weights of a damaged config, or larger than the memory in which they would be read, are not fetched; in kronsae's own
format, nor are weights larger than the config implies. Every file must have the size and the digest of the list. Of the
formats, only dictionary_learning's ``ae.pt`` holds a pickle, which is read without unpickling it
(`kronsae.interop.formats.torch_archive`). The files are kept in the Hub's own cache (``HF_HOME``), so that a download
is made once and works offline afterwards.
"""

from __future__ import annotations

import errno
import hashlib
import inspect
import itertools
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from kronsae.core import checkpoint
from kronsae.data.hub import TIMEOUT_SECONDS, one_line, refusals
from kronsae.interop import formats
from kronsae.interop.formats import sparsify
from kronsae.interop.formats.foreign import Files
from kronsae.interop.formats.reading import READING_BYTES, read_config
from kronsae.runs.sae_choice import choose
from kronsae.support.errors import UserError
from kronsae.support.resources import available_memory_bytes, check_disk, format_bytes
from kronsae.support.terminal import say

MAX_ELEMENT_BYTES = 8  # float64
MAX_FILES = 100_000  # in a repository; the largest public collections of SAEs have some ten thousand


@dataclass(frozen=True)
class Snapshot:
    """An SAE of a Hub repository, on this machine.

    Args:
        folder: the local folder with its config and weights; it belongs to the Hub's cache and must not be changed.
        repository: ``user/repo``.
        commit: commit of the repository that the files are of.
        path: folder of the SAE in the repository; ``""``: its root.
    """

    folder: Path
    repository: str
    commit: str
    path: str


@dataclass(frozen=True)
class _File:
    """A file of the repository: its size and digest, and whether that is a SHA-256 (large files) or git's SHA-1."""

    size: int
    digest: str | None = None
    large: bool = False


@dataclass(frozen=True)
class _Listing:
    """The files of a repository at one commit; ``cached``: those that are in the cache of this machine."""

    commit: str
    files: Mapping[str, _File]
    cached: bool = False


def is_repository(name: str) -> bool:
    """Return whether a name has the form ``user/repo``."""
    parts = name.split("/")
    return len(parts) == 2 and all(parts) and not name.startswith((".", "/", "~"))


def hub_place(source: str) -> tuple[str, str | None] | None:
    """Return repository and folder of ``user/repo``, ``user/repo/folder`` or ``user/repo:folder``; None: none of them.

    The folder is None if none is named.
    """
    repository, colon, inside = source.partition(":")
    if not colon:
        user, _, rest = source.partition("/")
        name, _, inside = rest.partition("/")
        repository = f"{user}/{name}"
    if not is_repository(repository) or (colon and not inside):
        return None
    return repository, inside.strip("/") or None


def download(
    repository: str,
    name: str | None = None,
    revision: str | None = None,
) -> Snapshot:
    """Return one SAE of a Hub repository, downloaded unless the cache has it; stderr says which commit it is.

    Where the Hub cannot be reached, or ``HF_HUB_OFFLINE=1`` is set, the copy in the cache is used.

    Args:
        repository: ``user/repo``.
        name: the SAE: its name in a run that `kronsae push` uploaded, its folder, or a folder with only one SAE; None:
            the only one.
        revision: branch, tag or commit; None: the default branch.

    Raises:
        UserError: the repository, its revision, the SAE or a file of it cannot be had, or the files are not what the
            list of files or the config says. Nothing is written outside the cache.
    """
    _check_revision(revision)
    listing = _listing(repository, revision)
    places = _places(repository, listing)
    path = choose(places, name, where=_where(repository, listing), source=repository)
    files = places[path]
    weights = str(PurePosixPath(path, files.weights))
    config = None if files.config is None else str(PurePosixPath(path, files.config))
    get = partial(_get, repository, revision or "main", listing)
    own = False
    if config is not None:
        _check_config(repository, config, listing.files[config].size)
        own = _is_own(repository, get(config, first=True), weights, listing.files[weights].size)
    _check_room(repository, listing.files[weights].size, own=own)
    fetched = [*([] if config is None else [config]), weights, *_more(listing, path, files)]
    if not listing.cached:
        total = format_bytes(sum(listing.files[file].size for file in fetched))
        say(f"{repository} at commit {listing.commit}: {', '.join(fetched)}; {total}")
    found = [get(file, first=file == fetched[0]) for file in fetched if file != config]
    return Snapshot(found[0].parent, repository, listing.commit, path)


def _where(repository: str, listing: _Listing) -> str:
    return f"{repository} at commit {listing.commit[:12]}{', of which the cache has a part' * listing.cached}"


def _places(repository: str, listing: _Listing) -> dict[str, Files]:
    """Return the folders of the repository that hold an SAE, and its files; ``"."``: the root.

    Raises:
        UserError: there is none.
    """
    names: dict[str, set[str]] = {}
    for file in listing.files:
        path = PurePosixPath(file)
        names.setdefault(str(path.parent), set()).add(path.name)
    found = {folder: files for folder in names if (files := formats.files_among(names[folder])) is not None}
    if not found:
        known = "; ".join(map(str, formats.all_files()))
        raise UserError(
            f"{_where(repository, listing)} must hold an SAE, a folder with {known}; it has none. Other files are not "
            "read."
        )
    return found


def _check_config(repository: str, config: str, size: int) -> None:
    most = checkpoint.MAX_CONFIG_BYTES
    if size > most:
        raise UserError(
            f"{repository} must have configs of at most {format_bytes(most)}; its {config} has {format_bytes(size)}. "
            "It was not downloaded."
        )


def _more(listing: _Listing, path: str, files: Files) -> list[str]:
    """Return what informs about an SAE, if it is there: of sparsify, the config of the run in the folder above."""
    if files.weights != sparsify.WEIGHTS_FILE or path == ".":
        return []
    file = str(sparsify.run_file(PurePosixPath(path)))
    return [file] if file in listing.files and listing.files[file].size <= checkpoint.MAX_CONFIG_BYTES else []


def _check_revision(revision: str | None) -> None:
    if revision is None:
        return
    if not re.fullmatch(r"[\w][\w./-]*", revision) or ".." in revision or revision.endswith("/"):
        raise UserError(f"revision must be a branch, a tag or a commit; got {revision!r}. Check revision.")


def _listing(repository: str, revision: str | None) -> _Listing:
    """Return the files of the repository, from the Hub or, where it cannot be reached, from the cache."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        with refusals("source", "repository", repository):
            commit = api.model_info(repository, revision=revision, timeout=TIMEOUT_SECONDS).sha
            if not re.fullmatch(r"[0-9a-f]{40}", commit or ""):
                raise UserError(f"{repository} must have a commit; the Hub names {commit!r}. Try again later.")
            entries = itertools.islice(api.list_repo_tree(repository, recursive=True, revision=commit), MAX_FILES + 1)
            files = dict(_entry(repository, entry) for entry in entries if hasattr(entry, "size"))
    except UserError:
        raise
    except Exception as error:  # the transport's own exceptions changed with every major version
        cached = _cached(repository, revision or "main")
        if cached is None:
            raise UserError(
                f"source: there is no folder and no copy in the cache of '{repository}'"
                f"{f' at revision {revision}' if revision else ''}, and the Hugging Face Hub cannot be reached "
                f"({one_line(error)}). Check the name and the network, or give a local folder."
            ) from error
        say(f"{repository} at commit {cached.commit}: the copy in the cache; the Hugging Face Hub cannot be reached.")
        return cached
    if len(files) > MAX_FILES:
        raise UserError(f"{repository} must have at most {MAX_FILES:,} files; it has more. Copy its SAE to a folder.")
    assert commit is not None  # matched above
    return _Listing(commit, files)


def _entry(repository: str, entry: Any) -> tuple[str, _File]:
    """Return path and properties of a file of the Hub's list.

    Raises:
        UserError: the path leaves the repository's folder, or is no path on every system.
    """
    path, size = entry.path, entry.size
    large = entry.lfs is not None
    digest = entry.lfs.sha256 if large else entry.blob_id
    parts = path.split("/") if isinstance(path, str) else [".."]
    if any(part in ("", ".", "..") for part in parts) or re.search(r'[\x00-\x1f\\:*?"<>|]', str(path)):
        raise UserError(f"{repository} must have files with plain relative paths; it has {path!r}. Do not use it.")
    if not isinstance(size, int) or size < 0 or not re.fullmatch(r"[0-9a-f]{64}" if large else r"[0-9a-f]{40}", digest):
        raise UserError(f"{repository} must state size and digest of each file; {path} has {size!r} and {digest!r}.")
    return path, _File(size, digest, large)


def _cache_root() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


def _cached(repository: str, revision: str) -> _Listing | None:
    """Return the files that the Hub's cache has of a revision; None if there is no such copy."""
    from huggingface_hub.file_download import repo_folder_name

    folder = _cache_root() / repo_folder_name(repo_id=repository, repo_type="model")
    reference = folder / "refs" / revision
    commit = reference.read_text("utf-8").strip() if reference.is_file() else revision
    snapshot = folder / "snapshots" / commit
    if not re.fullmatch(r"[0-9a-f]{40}", commit) or not snapshot.is_dir():
        return None
    found = [path for path in snapshot.rglob("*") if path.is_file()]
    files = {path.relative_to(snapshot).as_posix(): _File(path.stat().st_size) for path in found}
    return _Listing(commit, files, cached=True)


def _is_own(repository: str, config: Path, weights: str, size: int) -> bool:
    """Return whether kronsae wrote a config, after checking what it implies for the weights.

    Raises:
        UserError: it is no JSON object, or one of ours that implies larger or smaller weights.
    """
    read_config(config)
    if PurePosixPath(weights).name != checkpoint.WEIGHTS_FILE or not checkpoint.is_own(config.parent):
        return False
    elements = checkpoint.weight_elements(checkpoint.read_shape(config.parent))
    most = elements * MAX_ELEMENT_BYTES + checkpoint.MAX_HEADER_BYTES
    if not elements <= size <= most:
        raise UserError(
            f"{repository}: {weights} must have the size that its config implies, {elements:,} numbers in at most "
            f"{format_bytes(most)}; it has {format_bytes(size)}. It was not downloaded."
        )
    return True


def _check_room(repository: str, size: int, *, own: bool) -> None:
    """Refuse weights for which there is no room on the disk, or in memory while they are read and converted."""
    check_disk(_cache_root(), size, f"the weights of {repository}", "Make room, or set HF_HOME to another disk.")
    needed = size if own else size // MAX_ELEMENT_BYTES * READING_BYTES  # more, if the numbers have fewer bytes
    memory = available_memory_bytes()
    if memory is not None and needed > memory:
        raise UserError(
            f"the weights of {repository} must fit into memory; {format_bytes(needed)} or more are needed to read "
            f"them, and {format_bytes(memory)} are free. They were not downloaded."
        )


def _get(repository: str, revision: str, listing: _Listing, file: str, *, first: bool) -> Path:
    """Return the local path of a file, downloaded unless it is in the cache, after checking size and digest.

    The first file is asked for by branch or tag, so that the cache knows its commit.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    about = listing.files[file]
    known = try_to_load_from_cache(repository, file, revision=listing.commit)
    with _failures(repository, file):
        if not listing.cached and not isinstance(known, str):
            stated = get_hf_file_metadata(hf_hub_url(repository, file, revision=listing.commit))
            if (stated.size, stated.etag, stated.commit_hash) != (about.size, about.digest, listing.commit):
                raise UserError(
                    f"{repository}: {file} must be the file that the repository lists ({about.size:,} bytes, digest "
                    f"{about.digest}, commit {listing.commit}); the Hub offers {stated.size} bytes, digest "
                    f"{stated.etag}, commit {stated.commit_hash}. It was not downloaded."
                )
        options: dict[str, Any] = {"local_files_only": listing.cached}
        if "tqdm_class" in inspect.signature(hf_hub_download).parameters:  # not in older versions
            options["tqdm_class"] = _bar(about.size)
        path = Path(hf_hub_download(repository, file, revision=revision if first else listing.commit, **options))
    _check_place(repository, listing, file, path)
    _check_content(repository, file, path, about, downloaded=not isinstance(known, str))
    return path


def _check_place(repository: str, listing: _Listing, file: str, path: Path) -> None:
    """Refuse a file that is of another commit, or lies outside the cache, such as behind a symbolic link."""
    if path.parts[-len(PurePosixPath(file).parts) - 1] != listing.commit:
        raise UserError(f"{repository} was changed while it was downloaded. Try again.")
    if not path.resolve().is_relative_to(_cache_root().resolve()):
        raise UserError(f"{repository}: {path} must be a file in the Hub's cache; it leads to {path.resolve()}.")


def _check_content(repository: str, file: str, path: Path, about: _File, *, downloaded: bool) -> None:
    """Remove and refuse a file with another size, or a new one with another digest, than the repository lists."""
    if path.stat().st_size == about.size and (not downloaded or about.digest in (None, _digest(path, about))):
        return
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    raise UserError(
        f"{repository}: {file} must have {about.size:,} bytes and the digest that the repository lists; the downloaded "
        "file differs and was removed. Try again."
    )


def _digest(path: Path, about: _File) -> str:
    """Return the digest that the Hub lists: SHA-256 of a large file, otherwise git's SHA-1 of a blob."""
    digest = hashlib.sha256() if about.large else hashlib.sha1(f"blob {about.size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as content:
        while chunk := content.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _bar(limit: int) -> type:
    """Return a class of progress bars, shown on a terminal only, that stop a file longer than ``limit`` bytes."""
    from tqdm.auto import tqdm

    class Bounded(tqdm):  # type: ignore[misc]
        received = 0

        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)  # an argument of the Hub's own bars
            super().__init__(*args, **options | {"disable": not sys.stderr.isatty()})

        def update(self, n: float | None = 1) -> bool | None:
            self.received += int(n or 0)
            if self.received > limit:
                raise UserError(
                    f"the download must have {limit:,} bytes, as the repository lists; the Hub sent more. It was "
                    "stopped and not kept."
                )
            shown: bool | None = super().update(n)
            return shown

    return Bounded


@contextmanager
def _failures(repository: str, file: str) -> Iterator[None]:
    """Turn every failure of a download into one sentence."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        with refusals("source", "repository", repository):
            yield
    except UserError:
        raise
    except LocalEntryNotFoundError as error:  # a kind of EntryNotFoundError that means the network
        raise UserError(_not_downloaded(repository, file, error)) from error
    except EntryNotFoundError as error:
        raise UserError(f"{repository} must have {file}; the Hub does not offer it ({one_line(error)}).") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{repository}: {file} cannot be written to {_cache_root()}: the disk is full. Make room, or set "
                "HF_HOME to another disk."
            ) from error
        raise UserError(_not_downloaded(repository, file, error)) from error
    except Exception as error:  # the transport's own exceptions changed with every major version
        raise UserError(_not_downloaded(repository, file, error)) from error


def _not_downloaded(repository: str, file: str, error: Exception) -> str:
    return (
        f"{repository}: {file} could not be downloaded to {_cache_root()} ({one_line(error)}). Check the network and "
        "your access, and try again."
    )
