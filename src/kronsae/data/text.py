"""Text as a stream of documents, divided into a training and a held-out part by document."""

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
    """Which text to read.

    Args:
        source: ``"bundled"`` (Python's standard library), a local ``.txt``, ``.jsonl``, ``.json`` or
            ``.parquet`` file, a folder of such files, or a data set's name on the Hugging Face Hub.
        subset: Subset (configuration) of a Hub data set.
        split: Split of a Hub data set.
        column: Column that holds the text, in files with columns.
        revision: Branch, tag or commit of a Hub data set.
        streaming: Read a Hub data set while it downloads; otherwise download it first.
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

    Documents are divided by ``is_held_out(id, share)``, where the id is the name in the bundled corpus and
    the digest of the text elsewhere: the training stream leaves out what the held-out stream consists of,
    whatever the order. Blank documents are skipped.

    Args:
        text: What to read: a config, or any collection of strings that can be read more than once.
        held_out: Whether to read the held-out documents instead of the others.
        held_out_share: Expected share of documents held out, from 0 to 1.
        repeat: Whether to begin anew at the end, without end.
        state: Go on after the document that this state came with.

    Raises:
        UserError: If the text cannot be read, or no document is left on the chosen side.

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
            raise UserError(f"held_out_share must lie between 0 and 1; got {held_out_share}. Give 0.05 for 5%.")
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
            return UserError(f"text: a source must hold text; {self.source.name} has none. Give another one.")
        side, fate = ("held-out", "none") if self.held_out else ("training", "each")
        return UserError(
            f"held_out_share must leave a document for the {side} part; {fate} of the {usable} documents of "
            f"{self.source.name} falls into the held-out share of {self.held_out_share}. Give more documents "
            f"or a {'larger' if self.held_out else 'smaller'} held_out_share."
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
            f"text must be readable more than once; got a one-shot {type(text).__name__}. Put it into a list."
        )
    return ListedSource("the given texts", lambda: map(document_of, map(_string, text)))


def _string(text: object) -> str:
    if not isinstance(text, str):
        raise UserError(f"text must consist of strings; got {type(text).__name__}. Give a list of str.")
    return text
