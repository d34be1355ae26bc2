"""Imported once by the server from which the processes of `tests.distributed.processes` are forked."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import torch.distributed.checkpoint
import torch.distributed.tensor
import transformers.models.gpt_neox.modeling_gpt_neox

import kronsae.distributed.checkpoint
import kronsae.distributed.launch
import kronsae.runs.run
from kronsae.support.vector_math import warm_up

warm_up()
__all__ = ["kronsae", "torch", "transformers"]
