"""The registration in SAELens where SAELens is not installed; `tests/interop_real/saelens` tests it where it is."""

from __future__ import annotations

import importlib.util
from importlib import import_module

import pytest

from kronsae.support.errors import UserError


@pytest.mark.skipif(importlib.util.find_spec("sae_lens") is not None, reason="sae-lens is installed")
def test_without_sae_lens_the_import_says_what_to_install() -> None:
    with pytest.raises(UserError, match="pip install 'sae-lens>=6'"):
        import_module("kronsae.interop.saelens")
