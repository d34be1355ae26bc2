"""Stand-ins for two packages that delphi.latents imports for hard negatives, which no check here asks for."""

from __future__ import annotations

import sys
from types import ModuleType

for unused, name in (("faiss", "IndexFlatL2"), ("sentence_transformers", "SentenceTransformer")):
    if unused not in sys.modules:
        stand_in = ModuleType(unused)
        setattr(stand_in, name, object)
        sys.modules[unused] = stand_in
