"""What the fork server of tests/ranks.py imports once, so that no rank has to: 6 s of CPU for each, otherwise."""

import gc
import sys
import warnings

PATH = list(sys.path)  # a rank's own, before multiprocessing gives it pytest's

import torch.distributed.checkpoint.state_dict  # noqa: E402
import torch.distributed.fsdp  # noqa: E402
import torch.utils.tensorboard  # noqa: F401, E402

from s3_megatron import rehearsal  # noqa: E402

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the hosts say of themselves, once here instead of in every rank
    rehearsal.activate()  # Megatron's torch.compile decorators stay out; a rank turns it on for itself if it wants it
    import megatron.core.dist_checkpointing
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.training.training  # noqa: F401

    rehearsal.deactivate()
    import deepspeed.checkpoint.ds_to_universal
    import deepspeed.moe.layer
    import deepspeed.utils.zero_to_fp32  # noqa: F401

# Neither S3 in the hosts, nor a module that binds what S3 replaces in them: both are a rank's own choice.
gc.collect()
gc.freeze()  # a rank's collections then pass over all of this
