"""Display strings for tokens: every token is visible, whatever bytes it consists of."""

from __future__ import annotations

import codecs
import json
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

NOT_A_TOKEN = -1  # a position of a context window that lies outside the text
_MARKS = {"\n": "↵", "\r": "␍", "\t": "→", "\x7f": "␡"}
_CONTROL = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")  # control, format (such as marks of writing direction), ...


def visible(text: str) -> str:
    r"""Return ``text`` with visible control and format characters: ``↵`` for newline, ``→`` for tab, else escapes.

    Example:
        >>> visible("a\n\tb\x00\u202e")
        'a↵→b\\x00\\u202e'
    """
    return "".join(_MARKS.get(c) or (_escape(c) if unicodedata.category(c) in _CONTROL else c) for c in text)


def visible_lines(text: str) -> str:
    """Apply `visible` to each line; line breaks are kept."""
    return "\n".join(visible(line) for line in text.split("\n"))


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


class TokenText:
    """Converter from token ids to display strings, token by token.

    A Hugging Face tokenizer's ``decode`` of a single id loses the leading space, and the bytes of a character that
    spans several tokens. This class reads the vocabulary entries instead: byte-level BPE (GPT-2 and later),
    SentencePiece (``▁``, ``<0x0A>``) and WordPiece (``##ing``).

    Args:
        tokenizer: a Hugging Face tokenizer, or anything with ``convert_ids_to_tokens``.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(getattr(tokenizer, "all_special_ids", ()))
        decoder = _decoder_of(tokenizer)
        self._byte_level = '"ByteLevel"' in decoder
        self._word_piece = '"WordPiece"' in decoder
        self._bytes: dict[int, bytes] = {}

    def strings(self, ids: Sequence[int]) -> tuple[str, ...]:
        """Return one display string per token; joined, they give the text.

        A character that spans several tokens is shown at the token that completes it; the other tokens show their
        bytes as ``\\xe4``. Leading spaces are kept. Special tokens show their names.
        """
        decode = codecs.getincrementaldecoder("utf-8")("backslashreplace").decode
        shown = []
        for token in ids:
            if token in self._special:
                shown.append(visible(decode(b"", final=True) + self._piece(token)))
                continue
            raw = self._raw(token)
            shown.append(visible(decode(raw)) or "".join(f"\\x{byte:02x}" for byte in raw))
        return tuple(shown)

    def _raw(self, token: int) -> bytes:
        if token not in self._bytes:
            self._bytes[token] = self._to_bytes(self._piece(token))
        return self._bytes[token]

    def _piece(self, token: int) -> str:
        piece = self._tokenizer.convert_ids_to_tokens(token)
        return f"<{token}>" if piece is None else str(piece)

    def _to_bytes(self, piece: str) -> bytes:
        table = _byte_level_table()
        if self._byte_level and all(character in table for character in piece):
            return bytes(table[character] for character in piece)
        if self._word_piece:
            return (piece[2:] if piece.startswith("##") else f" {piece}").encode()
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes.fromhex(piece[3:5])
        return piece.replace("▁", " ").encode("utf-8", "surrogatepass")


def _decoder_of(tokenizer: Any) -> str:
    """Return the JSON of a fast tokenizer's decoder, which names its type; "" for any other tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return json.dumps(json.loads(backend.to_str()).get("decoder")) if backend is not None else ""


@lru_cache(maxsize=1)
def _byte_level_table() -> dict[str, int]:
    """Map byte-level BPE's characters to the 256 bytes (Radford et al. 2019, inverse of ``bytes_to_unicode``)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
