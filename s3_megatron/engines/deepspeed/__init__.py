"""S3 inside DeepSpeed: ``{"optimizer": {"type": "S3"}}`` for ZeRO 0 to 3, offload included."""

# None of these imports DeepSpeed: a patched one calls register() at the end of its own import, and would meet modules
# that are half there.
from s3_megatron.engines.deepspeed.collectives import use_gloo
from s3_megatron.engines.deepspeed.groups import decay_groups
from s3_megatron.engines.deepspeed.register import register, unregister
from s3_megatron.engines.deepspeed.stepping import Activity, activity

__all__ = ["Activity", "activity", "decay_groups", "register", "unregister", "use_gloo"]
