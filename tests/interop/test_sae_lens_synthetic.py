"""sae-lens' synthetic benchmark as a source of known features, without sae-lens; tests/interop_real has it."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import pytest

from kronsae.interop.sae_lens_synthetic import SaeLensConfig
from kronsae.support.errors import UserError

HERE = importlib.util.find_spec("sae_lens") is not None
SMALL = SaeLensConfig(features=256, d_in=24)


@pytest.mark.skipif(HERE, reason="sae-lens is installed")
def test_without_sae_lens_it_says_what_to_install() -> None:
    with pytest.raises(UserError, match="pip install sae-lens"):
        SMALL.build()


@pytest.mark.parametrize("changes", [{"features": 127}, {"d_in": 0}, {"seed": -1}])
def test_wrong_sizes_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="features must be at least 128"):
        replace(SMALL, **changes)
