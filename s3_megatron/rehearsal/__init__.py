"""Megatron on a machine without a GPU: one room that stands in for torch.cuda, on gloo."""

from s3_megatron.rehearsal.activation import activate, deactivate
from s3_megatron.rehearsal.flags import add_flags

__all__ = ["activate", "add_flags", "deactivate"]
