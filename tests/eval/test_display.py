from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kronsae.eval.display import TokenText, visible


class Pieces:
    """A tokenizer given by its pieces; ``backend`` as the JSON of its decoder."""

    def __init__(self, pieces: list[str], backend: str = "null", special: tuple[int, ...] = ()) -> None:
        self.pieces, self.all_special_ids = pieces, special
        self.backend_tokenizer = self
        self.backend = backend

    def to_str(self) -> str:
        return f'{{"decoder": {self.backend}}}'

    def convert_ids_to_tokens(self, token: int) -> str | None:
        return self.pieces[token] if token < len(self.pieces) else None

    def strings(self) -> tuple[str, ...]:
        return TokenText(self).strings(range(len(self.pieces)))


BYTE_LEVEL = '{"type": "ByteLevel"}'


def test_control_and_format_characters_become_visible() -> None:
    assert visible("a\n\tb\r") == "a↵→b␍"
    assert visible("\x00\x1b\x7f") == "\\x00\\x1b␡"
    assert visible("\u202eevil\u200b\u2028") == "\\u202eevil\\u200b\\u2028"
    assert visible("\ud800") == "\\ud800"
    assert visible("naïve 中文 مرحبا 🙂") == "naïve 中文 مرحبا 🙂"


@given(st.text())
@settings(max_examples=50, deadline=None)
def test_visible_is_idempotent_and_harmless(text: str) -> None:
    shown = visible(text)
    assert visible(shown) == shown
    assert not set(shown) & set("\n\r\t\x00\u202e\u2028")
    shown.encode()


def test_byte_level_pieces() -> None:
    assert Pieces(["Ġthe", "Ċ", "ĉ", "end"], BYTE_LEVEL).strings() == (" the", "↵", "→", "end")


def test_a_character_spread_over_tokens_stands_where_it_is_complete() -> None:
    """中 is e4 b8 ad: ä ¸ Ń in the letters of byte-level BPE."""
    assert Pieces(["Ġä", "¸", "Ńx"], BYTE_LEVEL).strings() == (" ", "\\xb8", "中x")
    assert Pieces(["ä¸", "Ń"], BYTE_LEVEL).strings() == ("\\xe4\\xb8", "中")


def test_bytes_that_are_no_text_are_shown_as_bytes() -> None:
    """A window may begin within a character, or end there, or hold bytes that never were one."""
    assert Pieces(["Ń", "a"], BYTE_LEVEL).strings() == ("\\xad", "a")
    assert Pieces(["a", "ä"], BYTE_LEVEL).strings() == ("a", "\\xe4")
    assert Pieces(["ä", "a"], BYTE_LEVEL).strings() == ("\\xe4", "\\xe4a")


def test_a_special_token_ends_a_broken_character() -> None:
    assert Pieces(["ä", "<eos>", "b"], BYTE_LEVEL, special=(1,)).strings() == ("\\xe4", "\\xe4<eos>", "b")


def test_sentence_piece() -> None:
    assert Pieces(["▁the", "ory", "<0x0A>", "<0xE4>", "<0xB8>", "<0xAD>"]).strings() == (
        " the",
        "ory",
        "↵",
        "\\xe4",
        "\\xb8",
        "中",
    )


def test_word_piece() -> None:
    assert Pieces(["the", "##ory", "[CLS]"], '{"type": "WordPiece"}', special=(2,)).strings() == (
        " the",
        "ory",
        "[CLS]",
    )


def test_an_id_beyond_the_vocabulary() -> None:
    assert TokenText(Pieces(["a"])).strings([0, 7]) == ("a", "<7>")


def test_a_tokenizer_without_a_backend() -> None:
    class Slow:
        def convert_ids_to_tokens(self, token: int) -> str:
            return "▁slow"

    assert TokenText(Slow()).strings([0]) == (" slow",)


@pytest.mark.parametrize("text", ["The quick\n\tfox, naïve 中文 🙂 done", "def f(x):\n    return x\n"])
def test_a_real_tokenizer_reads_back_as_the_text(text: str, tiny_model_folder: Callable[[str], Path]) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model_folder("gpt_neox"))
    shown = "".join(TokenText(tokenizer).strings(tokenizer(text, add_special_tokens=False)["input_ids"]))
    for number in range(256):
        shown = shown.replace(f"\\x{number:02x}", "")
    assert shown == visible(text)
