"""A stand-in for nnsight, which dictionary_learning imports for buffers of activations, which no check here asks for.

The version that dictionary_learning pins brings a torchvision that does not fit every build of torch.
"""

from __future__ import annotations

import sys
from types import ModuleType

if "nnsight" not in sys.modules:
    stand_in = ModuleType("nnsight")
    stand_in.LanguageModel = object  # type: ignore[attr-defined]
    sys.modules["nnsight"] = stand_in
