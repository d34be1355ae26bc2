"""``kronsae texts``: English text with human labels, made from NLTK's public corpora."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from kronsae.support.errors import UserError, nearest
from kronsae.support.terminal import Json, print_json, say, what_now

app = typer.Typer(
    no_args_is_help=True, help="Make a file of English text, or of its human labels, from NLTK's public corpora."
)


@app.command("english")
def english(
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write, such as english.jsonl.gz.")],
    nltk_data: Annotated[
        Path | None, typer.Option(help="Folder with the unpacked corpora; default: download them with NLTK.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a file of English text: Brown, ABC news, movie reviews, speeches and web text (22 million characters).

    With --text FILE every verb reads it. The corpora are downloaded into the cache: $KRONSAE_CACHE, else
    ~/.cache/kronsae.
    """
    from kronsae.data.english import download, write_english
    from kronsae.support.cache import cache_root

    if not out.name.endswith(".jsonl.gz"):
        raise UserError(f"--out must end in .jsonl.gz, the format of the file; got {out}.")
    folder = download(cache_root() / "nltk") if nltk_data is None else nltk_data
    documents, characters, digest = write_english(folder, out)
    if as_json:
        print_json({"out": str(out), "documents": documents, "characters": characters, "sha256_of_lines": digest})
    say(f"{out}: {documents:,} documents, {characters:,} characters, SHA-256 of the lines {digest}")
    file = shlex.quote(str(out))
    what_now(f"kronsae quickstart --model smollm2 --text {file}, or kronsae texts labels {file}")


@app.command("labels")
def labels(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file that `kronsae texts english` wrote.")],
    name: Annotated[str, typer.Option("--name", help="parts-of-speech, categories or sentiment.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write, such as labels.jsonl.")],
    as_json: Json = False,
) -> None:
    """Write the human labels of the text for `--labels FILE` of `kronsae eval probing` and `absorption`."""
    from typing import get_args

    from kronsae.data.english import LabelName, write_labels

    names: tuple[LabelName, ...] = get_args(LabelName)
    chosen = next((one for one in names if one == name), None)
    if chosen is None:
        raise UserError(f"--name must be one of {', '.join(names)}; got '{name}'.{nearest(name, names)}")
    passages, labels = write_labels(file, chosen, out)
    if as_json:
        print_json({"out": str(out), "passages": passages, "labels": labels})
    say(f"{out}: {passages:,} passages with {labels:,} labels")
    what_now(f"kronsae eval probing RUN --labels {shlex.quote(str(out))}")
