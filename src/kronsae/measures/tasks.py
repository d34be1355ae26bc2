"""Labelled text for a run: names in Python code, prompts over the model's vocabulary, or a user's file."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from kronsae.data.corpus import Document, is_held_out
from kronsae.data.model import BUNDLED
from kronsae.data.sources import document_of
from kronsae.data.text import TextStream
from kronsae.data.tokens import special_frame
from kronsae.eval.first_letter import first_letter_prompts
from kronsae.eval.labelling import Frame, Passage, Place, Sizes, Span, Task, make_task
from kronsae.eval.python_code import ROLES, name_roles
from kronsae.runs.loaded import LoadedRun
from kronsae.support.errors import UserError
from kronsae.support.files import atomic_path, check_folder_place
from kronsae.support.tensors import read_tensors

TaskName = Literal["roles", "first-letter", "labels"]
HELD_OUT_SHARE = 0.2  # share of a user's labelled texts used for testing
DOCUMENTS = 120  # documents of code to train on; a quarter as many are used for testing


def default_task(loaded: LoadedRun) -> TaskName:
    """Return ``roles`` for a run on Python's library, and ``first-letter`` for any other text."""
    return "roles" if loaded.run.config.text.source == BUNDLED else "first-letter"


def frame_of(loaded: LoadedRun) -> Frame:
    """Return the special tokens that the run puts around every window."""
    return special_frame(loaded.source.language_model.tokenizer)


def documents(loaded: LoadedRun, *, held_out: bool, number: int) -> Iterator[Document]:
    """Yield the first documents of the run's training or held-out text."""
    config = loaded.run.config
    stream = TextStream(config.text, held_out=held_out, held_out_share=config.held_out_share, repeat=False)
    return (document for document, _ in itertools.islice(stream, number))


def build_task(
    loaded: LoadedRun, name: TaskName, *, labels: Path | None, windows: int, place: Place, seed: int
) -> Task:
    """Return the examples of a task, tokenised for the run's model.

    Raises:
        UserError: the text does not contain enough labelled examples.
    """
    tokenizer, frame = loaded.source.language_model.tokenizer, frame_of(loaded)
    passages: Iterator[Passage]
    classes = None
    if name == "labels":
        if labels is None:
            raise UserError("the task 'labels' must have a file of labelled text; got none. Give --labels FILE.jsonl.")
        passages, sizes = read_labelled(labels), Sizes(windows=windows, per_word=20)
    elif name == "first-letter":
        passages = first_letter_prompts(tokenizer, max_words=windows * 5 // 4, seed=seed)
        sizes = Sizes(windows=windows, per_class=windows, at_least=2)
    else:
        passages, classes, sizes = _roles(loaded), ROLES, Sizes(windows=windows, per_class=400)
    return make_task(
        name if labels is None else labels.name,
        passages,
        tokenizer,
        frame=frame,
        context_length=loaded.run.config.context_length,
        classes=classes,
        sizes=sizes,
        place=place,
        whole=name == "first-letter",
        seed=seed,
    )


def _roles(loaded: LoadedRun) -> Iterator[Passage]:
    for held_out, number in ((False, DOCUMENTS), (True, DOCUMENTS // 4)):
        for document in documents(loaded, held_out=held_out, number=number):
            yield Passage(text=document.text, spans=tuple(name_roles(document.text)), held_out=held_out)


def read_labelled(path: Path) -> Iterator[Passage]:
    """Yield the passages of a JSON-lines file of labelled text.

    A line is ``{"text", "label"}`` or ``{"text", "spans": [{"start", "end", "label"}, ...]}``. Spans count characters.
    A label without spans applies to the whole text. ``"held_out": true`` or ``false`` assigns a text to the test or
    training split. Otherwise a fifth of the texts are held out, by a hash of the text in lower case with single spaces,
    so that two spellings of one text are in the same split.

    Raises:
        UserError: a line has another form; the message gives its number.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would also split at U+2028 in a text
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"labels must be a readable UTF-8 file; {path} cannot be read ({error}).") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _passage(line, f"{path}, line {number}")


def _passage(line: str, where: str) -> Passage:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str) or not row["text"]:
        raise UserError(f'{where} must be a JSON object with a "text"; got {line[:60]!r}.')
    unknown = set(row) - {"text", "label", "spans", "held_out"}
    if unknown or ("label" in row) == ("spans" in row):
        raise UserError(f'{where} must have "text" and either "label" or "spans"; got {", ".join(map(str, row))}.')
    text = row["text"]
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(
            f'{where}: "text" must be valid Unicode; got an unpaired surrogate, which no tokenizer accepts.'
        )
    spans = row.get("spans", [{"start": 0, "end": len(text), "label": row.get("label")}])
    folded = " ".join(text.lower().split())
    held_out = row.get("held_out", is_held_out(document_of(folded).id, HELD_OUT_SHARE))
    if not isinstance(spans, list) or not isinstance(held_out, bool):
        raise UserError(f'{where}: "spans" must be a list, and "held_out" must be true or false.')
    return Passage(text=text, spans=tuple(_span(span, text, where) for span in spans), held_out=held_out)


def _span(span: Any, text: str, where: str) -> Span:
    found = span if isinstance(span, dict) else {}
    start, end, label = found.get("start"), found.get("end"), found.get("label")
    labelled = isinstance(label, str) and bool(label.strip())
    if type(start) is int and type(end) is int and labelled and 0 <= start < end <= len(text):
        return Span(start=start, end=end, label=str(label))
    raise UserError(
        f'{where}: a span must be {{"start", "end", "label"}} with 0 <= start < end <= {len(text)} and a non-blank '
        f"label; got {span!r}."
    )


def example_activations(
    loaded: LoadedRun,
    task: Task,
    cache: Path,
    progress: Callable[[int, int], None] | None = None,
    *,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Float[Tensor, "E D"], bool]:
    """Return the activations of a task's examples, float32 ``[E, d_in]``, and whether they were cached.

    The name of the cache file is a hash of what determines the activations (weights of the model, hook, tokens,
    places), so another model of the same name never uses it. A damaged file is reported and replaced.

    Raises:
        UserError: ``cache`` cannot be a folder to write to.
    """
    check_folder_place(cache, "cache")
    path = cache / f"{_digest(loaded, task)}.safetensors"
    if path.exists():
        known_ED = _read_cached(path, len(task.words))
        if known_ED is not None:
            return known_ED, True
        say(f"The cached activations in {path} are damaged; they are computed again.")
    x_ED = torch.cat([x_ND.cpu() for _, x_ND in loaded.activations(list(task.windows), progress)])
    with atomic_path(path) as temporary:
        save_file({"x_ED": x_ED}, temporary)
    return x_ED, False


def _read_cached(path: Path, examples: int) -> Tensor | None:
    """Return the activations that `example_activations` wrote; None if the file holds anything else."""
    try:
        found = read_tensors(path)
    except (OSError, ValueError, SafetensorError):
        return None
    x_ED = found.get("x_ED")
    valid = x_ED is not None and x_ED.ndim == 2 and len(x_ED) == examples and x_ED.dtype == torch.float32
    return x_ED if valid and bool(x_ED.isfinite().all()) else None  # type: ignore[union-attr]


def _digest(loaded: LoadedRun, task: Task) -> str:
    content = hashlib.blake2b(f"{loaded.hook.name} {task.digest()}".encode(), digest_size=16)
    for name, tensor in loaded.source.language_model.model.state_dict().items():
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + raw.numpy().tobytes())
    return content.hexdigest()
