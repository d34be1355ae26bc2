"""Yield documents from the training or the held-out part of a text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kronsae.data.corpus import Document, is_held_out
from kronsae.data.model import BUNDLED
from kronsae.data.sources import ListedSource, Source, document_of, open_named
from kronsae.data.stream import State
from kronsae.support.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Source of a text and how to read it.

    Args:
        source: ``"bundled"`` (Python's standard library), a local ``.txt``, ``.jsonl``, ``.json`` or
            ``.parquet`` file, a folder of such files, or a data set's name on the Hugging Face Hub.
        subset: Subset (configuration) of a Hub data set.
        split: Split of a Hub data set.
        column: Column that holds the text, in files with columns.
        revision: Branch, tag or commit of a Hub data set.
        streaming: Whether to read a Hub data set while it downloads, or to download it first.
    """

    source: str = BUNDLED
    subset: str | None = None
    split: str = "train"
    column: str = "text"
    revision: str | None = None
    streaming: bool = True

    def __post_init__(self) -> None:
        if not self.source:
            raise UserError("source must name a text; got ''. Give 'bundled', a path or a Hub data set.")


class TextStream:
    """Yield ``(Document, state)``; the state is ``{"epoch", "document", ...}``.

    Documents are assigned to the training or the held-out part by ``is_held_out(id, share)``, independently of their
    order. The id is the document's name in the bundled corpus and the digest of the text elsewhere. Blank documents
    are skipped.

    Args:
        text: A config, or any collection of strings that can be iterated more than once.
        held_out: Whether to read the held-out part instead of the training part.
        held_out_share: Expected share of held-out documents, from 0 to 1.
        repeat: Whether to repeat the text indefinitely.
        state: State yielded with a document; iteration resumes after that document.

    Raises:
        UserError: If the text cannot be read, or the chosen part has no document.

    Example:
        >>> stream = TextStream(["one text", "another text"], held_out_share=0.0, repeat=False)
        >>> [(document.text, state["document"]) for document, state in stream]
        [('one text', 1), ('another text', 2)]
    """

    def __init__(
        self,
        text: TextConfig | Iterable[str],
        *,
        held_out: bool = False,
        held_out_share: float = 0.05,
        repeat: bool = True,
        state: State | None = None,
    ) -> None:
        if not 0.0 <= held_out_share <= 1.0:
            raise UserError(f"held_out_share must be from 0 to 1; got {held_out_share}. Give 0.05 for 5%.")
        self.source = _open(text)
        self.held_out = held_out
        self.held_out_share = held_out_share
        self.repeat = repeat
        self._state: State = {"epoch": 0} if state is None else state

    def __iter__(self) -> Iterator[tuple[Document, State]]:
        epoch = self._state["epoch"]
        position = {key: value for key, value in self._state.items() if key != "epoch"}
        while True:
            usable = 0
            found = bool(position)  # the rest of a resumed epoch may be empty
            for document, position in self.source.read(position):  # noqa: B020 - ends as the last position
                if not document.text.strip():
                    continue
                usable += 1
                if is_held_out(document.id, self.held_out_share) == self.held_out:
                    found = True
                    yield document, {"epoch": epoch, **position}
            if not found:
                raise self._nothing_found(usable)
            if not self.repeat:
                return
            epoch, position = epoch + 1, {}

    def _nothing_found(self, usable: int) -> UserError:
        if usable == 0:
            return UserError(f"text: a source must contain text; {self.source.name} has none. Give another source.")
        part, assigned = ("held-out", "none") if self.held_out else ("training", "each")
        return UserError(
            f"held_out_share must leave a document for the {part} part; got {self.held_out_share}, with which "
            f"{assigned} of the {usable} documents of {self.source.name} is held out. Give more documents or a "
            f"{'larger' if self.held_out else 'smaller'} held_out_share."
        )


def _open(text: TextConfig | Iterable[str]) -> Source:
    if isinstance(text, TextConfig):
        return open_named(
            text.source,
            subset=text.subset,
            split=text.split,
            column=text.column,
            revision=text.revision,
            streaming=text.streaming,
        )
    if isinstance(text, str):
        raise UserError("text must be a TextConfig or several strings; got one string. Put it into a list.")
    if iter(text) is text:
        raise UserError(
            f"text must be iterable more than once; got a one-shot {type(text).__name__}. Put it into a list."
        )
    return ListedSource("the given texts", lambda: map(document_of, map(_string, text)))


def _string(text: object) -> str:
    if not isinstance(text, str):
        raise UserError(f"text must contain only strings; got {type(text).__name__}. Give a list of str.")
    return text
