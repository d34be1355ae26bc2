"""Download of one SAE from a Hugging Face Hub repository, in which a stranger may have put anything.

The list of the repository's files is read first, at one commit. Of the chosen folder only the configs and weights that
kronsae, SAELens and sparsify name are fetched, never a pickle. The config is fetched before the weights; in kronsae's
own format, weights larger than it implies are not fetched. Every file must have the size and the digest of the list.
The files are kept in the Hub's own cache (``HF_HOME``), so that a download is made once and works offline afterwards.
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
from kronsae.interop.formats import dictionary_learning, gemma_scope, sae_lens, sparsify
from kronsae.support.errors import UserError, nearest
from kronsae.support.resources import available_memory_bytes, check_disk, format_bytes
from kronsae.support.terminal import say

CONFIGS = tuple(dict.fromkeys((checkpoint.CONFIG_FILE, sae_lens.CONFIG_FILE, sparsify.CONFIG_FILE, sparsify.RUN_FILE)))
WEIGHTS = tuple(dict.fromkeys((checkpoint.WEIGHTS_FILE, sae_lens.WEIGHTS_FILE, sparsify.WEIGHTS_FILE)))
NOT_FETCHED = (gemma_scope.WEIGHTS_FILE, dictionary_learning.WEIGHTS_FILE)  # read in local folders only
MAX_ELEMENT_BYTES = 8  # float64
MAX_FILES = 100_000  # in a repository; the largest public collections of SAEs have some ten thousand
RUN_FOLDER = "saes"


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


def download(
    repository: str,
    name: str | None = None,
    revision: str | None = None,
) -> Snapshot:
    """Return one SAE of a Hub repository, downloaded unless the cache has it; stderr says which commit it is.

    Where the Hub cannot be reached, or ``HF_HUB_OFFLINE=1`` is set, the copy in the cache is used.

    Args:
        repository: ``user/repo``.
        name: the SAE: its name in a run that `kronsae push` uploaded, or its folder; None: the only one.
        revision: branch, tag or commit; None: the default branch.

    Raises:
        UserError: the repository, its revision, the SAE or a file of it cannot be had, or the files are not what the
            list of files or the config says. Nothing is written outside the cache.
    """
    _check_revision(revision)
    listing = _listing(repository, revision)
    path = _choose(repository, listing, name)
    inside = {file: about for file, about in listing.files.items() if PurePosixPath(file).parent == PurePosixPath(path)}
    config = str(PurePosixPath(path, checkpoint.CONFIG_FILE))
    configs = {file: about for file, about in inside.items() if PurePosixPath(file).name in CONFIGS}
    weights = {file: about for file, about in inside.items() if PurePosixPath(file).name in WEIGHTS}
    most = checkpoint.MAX_CONFIG_BYTES
    for file, about in configs.items():
        if about.size > most:
            raise UserError(
                f"{repository} must have configs of at most {format_bytes(most)}; its {file} has "
                f"{format_bytes(about.size)}. It was not downloaded."
            )
    get = partial(_get, repository, revision or "main", listing)
    folder = get(config, configs[config]).parent
    if _is_ours(folder):
        configs = {config: configs[config]}
        weights = _own_weights(repository, path, weights, folder)
    _check_room(repository, weights)
    others = {file: about for file, about in (configs | weights).items() if file != config}
    if not listing.cached:
        total = format_bytes(sum(about.size for about in (configs | weights).values()))
        say(f"{repository} at commit {listing.commit}: {', '.join(sorted([config, *others]))}; {total}")
    for file, about in others.items():
        get(file, about)
    return Snapshot(folder, repository, listing.commit, path)


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


def _choose(repository: str, listing: _Listing, name: str | None) -> str:
    """Return the folder of the SAE in the repository; ``"."``: its root."""
    paths = [PurePosixPath(file) for file in listing.files]
    with_weights = {str(path.parent) for path in paths if path.name in WEIGHTS}
    known = {
        folder.removeprefix(f"{RUN_FOLDER}/"): folder
        for folder in sorted(with_weights)
        if str(PurePosixPath(folder, checkpoint.CONFIG_FILE)) in listing.files
    }
    where = f"{repository} at commit {listing.commit[:12]}{', of which the cache has a part' * listing.cached}"
    if not known:
        rule = f"{where}, must hold an SAE: a folder with {checkpoint.CONFIG_FILE} and {' or '.join(WEIGHTS)}"
        if other := next((one for one in NOT_FETCHED if any(path.name == one for path in paths)), None):
            raise UserError(
                f"{rule}; {other} is not fetched from the Hub. Download the folder that holds it and give its path."
            )
        raise UserError(f"{rule}; it has none. Pickled weights are not read.")
    if name is None:
        if "." in known:
            return "."
        own = [short for short, folder in known.items() if folder.startswith(f"{RUN_FOLDER}/")]
        candidates = own or list(known)
        if len(candidates) == 1:
            return known[candidates[0]]
    elif name.strip("/") in known:
        return known[name.strip("/")]
    elif name in known.values():
        return name
    hint = "" if name is None else nearest(name, known)
    shown = [short for short in known if short != "."][:20]
    more = f" and {len(known) - 20} more" if len(known) > 20 else ""
    raise UserError(f"name must be one of {', '.join(shown)}{more} for {where}; got {name!r}.{hint}")


def _is_ours(folder: Path) -> bool:
    """Return whether the config is of an SAE that kronsae saved."""
    from kronsae.support.files import read_json

    config = read_json(folder / checkpoint.CONFIG_FILE, "the downloaded SAE")
    return isinstance(config, dict) and "sae" in config and "format" in config


def _own_weights(repository: str, path: str, weights: Mapping[str, _File], folder: Path) -> dict[str, _File]:
    """Return the weights file of one of our SAEs, after checking that it is not larger than the config implies."""
    file = str(PurePosixPath(path, checkpoint.WEIGHTS_FILE))
    if file not in weights:
        raise UserError(f"{repository} must have {file} beside its config; it does not. Pickled weights are not read.")
    elements = checkpoint.weight_elements(checkpoint.read_shape(folder))
    most, size = elements * MAX_ELEMENT_BYTES + checkpoint.MAX_HEADER_BYTES, weights[file].size
    if not elements <= size <= most:
        raise UserError(
            f"{repository}: {file} must have the size that its config implies, {elements:,} numbers in at most "
            f"{format_bytes(most)}; it has {format_bytes(size)}. It was not downloaded."
        )
    return {file: weights[file]}


def _check_room(repository: str, weights: Mapping[str, _File]) -> None:
    total = sum(about.size for about in weights.values())
    check_disk(_cache_root(), total, f"the weights of {repository}", "Make room, or set HF_HOME to another disk.")
    memory = available_memory_bytes()
    if memory is not None and total > memory:
        raise UserError(
            f"the weights of {repository} must fit into memory; they have {format_bytes(total)}, and "
            f"{format_bytes(memory)} are free. They were not downloaded."
        )


def _get(repository: str, revision: str, listing: _Listing, file: str, about: _File) -> Path:
    """Return the local path of a file, downloaded unless it is in the cache, after checking size and digest."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    known = try_to_load_from_cache(repository, file, revision=listing.commit)
    first = file.endswith(checkpoint.CONFIG_FILE)  # asked for by branch or tag, so that the cache knows its commit
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
