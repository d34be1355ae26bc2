"""Imported once by the server from which the processes of a campaign are forked."""

from __future__ import annotations

import torch.distributed.checkpoint
import torch.distributed.tensor
import transformers.models.llama.modeling_llama

import kronsae.distributed.checkpoint
import kronsae.doctor.work
from kronsae.support.vector_math import warm_up

warm_up()
__all__ = ["kronsae", "torch", "transformers"]
