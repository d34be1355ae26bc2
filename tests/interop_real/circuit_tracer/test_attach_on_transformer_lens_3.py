"""The checks of `kronsae.attach` under TransformerLens 3, which has ``HookedTransformer`` beside the bridge."""

from __future__ import annotations

from tests.interop_real.attach.test_transformer_lens import test_a_transcoder_and_unknown_hooks, test_attach

__all__ = ["test_a_transcoder_and_unknown_hooks", "test_attach"]
