"""Upload of a run's SAEs to a repository of the Hugging Face Hub: safetensors, JSON and the model card only."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from kronsae.core import checkpoint
from kronsae.data.hub import one_line
from kronsae.interop.exportable import Exportable
from kronsae.publishing.card import DEFAULT_LICENSE, model_card
from kronsae.publishing.export import exportable, target_module
from kronsae.publishing.public import origin_of, public_config
from kronsae.runs.folder import RunFolder
from kronsae.runs.hub_download import is_repository
from kronsae.runs.sae_choice import RUN_FOLDER
from kronsae.support.errors import UserError, nearest
from kronsae.support.files import write_text
from kronsae.support.sealed import write_sealed

CARD_FILE = "README.md"
FORMATS = ("saelens",)
"""Formats of other libraries that can be uploaded beside ours; each doubles the size."""

PATTERNS = [CARD_FILE, "*.json", "*.safetensors"]


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What was uploaded, or would be.

    Args:
        repository: ``user/repo``.
        files: size in bytes of each file, by its path in the repository.
        card: the model card.
        commit: commit that holds the files; None: nothing was uploaded.
        url: page of the commit.
    """

    repository: str
    files: Mapping[str, int]
    card: str
    commit: str | None = None
    url: str | None = None


def push_run(
    run: RunFolder,
    repository: str,
    names: Sequence[str] = (),
    *,
    private: bool = False,
    revision: str | None = None,
    license: str = DEFAULT_LICENSE,
    formats: Sequence[str] = (),
    dry_run: bool = False,
) -> Pushed:
    """Upload SAEs of a finished run in one commit, with a model card written from the run.

    Files of the same paths are replaced, ``README.md`` too; all others stay. ``cfg.json`` is uploaded without paths of
    this machine; the weights are uploaded as they are.

    Args:
        run: a finished run of a training.
        repository: ``user/repo``; created if there is none.
        names: SAEs to upload; none: all of the run.
        private: create a private repository.
        revision: branch to upload to, created if there is none; None: the default branch.
        license: identifier of the licence of the weights, as the Hub knows it.
        formats: of `FORMATS`: formats of other libraries to upload too, in a folder of that name.
        dry_run: only prepare the files and describe them; no network is used.

    Raises:
        UserError: an argument is invalid, the run is imported or not finished, or the Hub refuses or cannot be
            reached. Nothing has been committed.
    """
    if not is_repository(repository):
        raise UserError(f"the repository must be user/repo on the Hub; got '{repository}'.")
    for name in formats:
        if name not in FORMATS:
            raise UserError(f"--with must be one of {', '.join(FORMATS)}; got '{name}'.{nearest(name, FORMATS)}")
    run.require_finished()
    if run.imported:
        raise UserError(
            f"the run must be one that kronsae trained; {run.folder} holds imported SAEs ({', '.join(run.names)}), "
            "which are not uploaded. Give the folder of a training."
        )
    chosen = tuple(dict.fromkeys(names or run.names))
    with tempfile.TemporaryDirectory(prefix="kronsae-push-") as folder:
        card = _prepare(run, Path(folder), repository, chosen, license, formats)
        paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
        if dry_run:
            return Pushed(repository=repository, files=files, card=card)
        commit, url = _upload(Path(folder), repository, private, revision)
    return Pushed(repository=repository, files=files, card=card, commit=commit, url=url)


def _prepare(
    run: RunFolder, folder: Path, repository: str, names: Sequence[str], license: str, formats: Sequence[str]
) -> str:
    """Write what is uploaded into an empty folder and return the model card."""
    card = model_card(run, repository, names, license=license, with_saelens="saelens" in formats)
    for name in names:
        source, target = run.sae_folder(name), folder / RUN_FOLDER / name
        target.mkdir(parents=True)
        shutil.copyfile(source / checkpoint.WEIGHTS_FILE, target / checkpoint.WEIGHTS_FILE)
        write_sealed(target / checkpoint.CONFIG_FILE, public_config(checkpoint.read_config(source)))
    for to in formats:
        module = target_module(to)
        saes = [_public(exportable(run, name)) for name in names]
        module.check(tuple(saes))
        for one in saes:
            module.export((one,), folder / to / one.name)
    write_text(folder / CARD_FILE, card)
    return card


def _public(one: Exportable) -> Exportable:
    """Return what is exported without the paths of this machine."""
    return replace(
        one,
        model=None if one.model is None else origin_of(one.model).name,
        text=None if one.text is None else origin_of(one.text).name,
        metadata=public_config({"metadata": one.metadata})["metadata"],
    )


def _upload(folder: Path, repository: str, private: bool, revision: str | None) -> tuple[str, str]:
    """Upload a folder in one commit and return the commit's hash and page."""
    from huggingface_hub import HfApi

    api = HfApi()
    with _refusals(repository):
        api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.model_info(repository).private:
            raise UserError(
                f"--private must be used with a new or private repository; {repository} exists and is public. Change "
                "it in its settings on the Hub, or leave --private out."
            )
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        info = api.upload_folder(
            folder_path=folder,
            repo_id=repository,
            revision=revision,
            allow_patterns=PATTERNS,
            commit_message=f"SAEs trained with kronsae {version('kronsae')}",
        )
    return info.oid, info.commit_url


@contextmanager
def _refusals(repository: str) -> Iterator[None]:
    """Turn every failure of an upload into one sentence."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    try:
        yield
    except UserError:
        raise
    except HFValidationError as error:
        raise UserError(f"the repository must be user/repo on the Hub; got '{repository}'.") from error
    except LocalTokenNotFoundError as error:
        raise UserError("a token of the Hub must be there to upload; none was found. Run 'hf auth login'.") from error
    except HfHubHTTPError as error:
        status = None if error.response is None else error.response.status_code
        if status in (401, 403):
            raise UserError(
                f"'{repository}' must be a repository that you may write to; the Hub refuses (status {status}). Run "
                "'hf auth login' with a token that has write access, or name another repository."
            ) from error
        raise UserError(f"the upload to '{repository}' failed ({one_line(error)}). Try again later.") from error
    except Exception as error:  # the transport's own exceptions changed with every major version
        raise UserError(
            f"the upload to '{repository}' failed ({one_line(error.__cause__ or error)}). Check the network and try "
            "again; nothing was committed."
        ) from error
