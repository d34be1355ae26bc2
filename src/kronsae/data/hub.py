"""What can be known about a name on the Hugging Face Hub before anything is downloaded."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kronsae.support.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

TIMEOUT_SECONDS = 10.0


def one_line(error: BaseException) -> str:
    """Return what another library's exception says, as one line without its full stop."""
    text = str(error).strip() or type(error).__name__
    return textwrap.shorten(text, 240, placeholder=" ...").rstrip(".")


def looks_like_path(name: str) -> bool:
    """Whether a name can only mean a path: Hub names are ``name`` or ``owner/name``."""
    return name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1


def check_dataset(name: str, revision: str | None) -> None:
    """Raise a UserError unless the Hub can be reached and has the data set."""
    from huggingface_hub import HfApi

    ask = HfApi().dataset_info
    unreachable = _ask(lambda: ask(name, revision=revision, timeout=TIMEOUT_SECONDS), "text", "data set", name)
    if unreachable:
        raise UserError(
            f"text: there is no '{name}' here, and the Hugging Face Hub cannot be reached ({unreachable}). "
            "Check the name and the network, or give a local file or folder."
        )


def check_model(name: str, revision: str | None) -> bool:
    """Return whether the model must come from the local cache, since the Hub cannot be reached.

    ``from_pretrained`` by itself retries each file for half a minute before it looks into the cache.

    Raises:
        UserError: If the Hub has no such model, or is out of reach and the cache is empty.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    ask = HfApi().model_info
    unreachable = _ask(lambda: ask(name, revision=revision, timeout=TIMEOUT_SECONDS), "model", "model", name)
    if unreachable and not isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
        raise UserError(
            f"model: there is no folder and no cached model '{name}', and the Hugging Face Hub cannot be "
            f"reached ({unreachable}). Check the name and the network, or give a local folder."
        )
    return bool(unreachable)


def _ask(ask: Callable[[], object], argument: str, kind: str, name: str) -> str:
    """Return why the Hub cannot be reached, or ``""`` where it knows the name; else raise a UserError."""
    try:
        with refusals(argument, kind, name):
            ask()
    except UserError:
        raise
    except Exception as error:  # the transport's own exceptions changed with every major version
        return one_line(error)
    return ""


@contextmanager
def refusals(argument: str, kind: str, name: str) -> Iterator[None]:
    """Turn the Hub's refusals inside the block into one sentence; faults of the network pass through.

    Args:
        argument: the argument that holds the name.
        kind: what is asked for: ``"model"``, ``"data set"``, ``"repository"``.
        name: its name on the Hub.

    Raises:
        UserError: the name is impossible or unknown, gated, or has no such revision.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except HFValidationError as error:
        raise UserError(
            f"{argument}: '{name}' is neither a local path that exists nor a possible Hub name. Check the spelling."
        ) from error
    except GatedRepoError as error:
        raise UserError(
            f"{argument}: the {kind} '{name}' is gated on the Hugging Face Hub. Ask for access on its page "
            "and log in with 'hf auth login'."
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(
            f"{argument}: the Hugging Face Hub has no such revision of '{name}'. Check revision."
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{argument}: there is no local path '{name}', and the Hugging Face Hub has no public {kind} of "
            "that name. Check the spelling, or log in with 'hf auth login' if it is private."
        ) from error
