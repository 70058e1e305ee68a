"""A person's own pretraining script, which knows nothing of this package: GPT on Megatron's mock data.

megatron-core changed how a script gives it a model: 0.17 and 0.18 call a function, 0.19 reads a configuration. And
since 0.18 the script parses the command line.
"""

import inspect

import helper_of_stock_script  # beside the script, as python allows
import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.training import argument_utils, arguments, get_args, get_tokenizer, pretrain, print_rank_0

DEFAULTS = {"tokenizer_type": "NullTokenizer"}


def datasets(sizes):
    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        tokenizer=get_tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    return BlendedMegatronDatasetBuilder(MockGPTDataset, sizes, lambda: True, config).build()


def forward_step(data_iterator, model):
    batch = {key: value.cuda() for key, value in next(data_iterator).items()}
    output = model(batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"])

    def loss_function(losses):
        loss = losses.float().mean()
        reported = loss.detach().clone()
        torch.distributed.all_reduce(reported, group=mpu.get_data_parallel_group())
        return loss, {"lm loss": reported / mpu.get_data_parallel_world_size()}

    return output, loss_function


def build_model(pre_process=True, post_process=True, vp_stage=None, config=None, pg_collection=None):
    args = get_args()
    home = argument_utils if hasattr(argument_utils, "core_transformer_config_from_args") else arguments
    return GPTModel(
        config or home.core_transformer_config_from_args(args),
        get_gpt_layer_local_spec(),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )


if __name__ == "__main__":
    datasets.is_distributed = True
    print_rank_0(f"stock script: {helper_of_stock_script.GREETING}")
    if "cfg_container" not in inspect.signature(pretrain).parameters:  # 0.17
        pretrain(datasets, build_model, ModelType.encoder_or_decoder, forward_step, args_defaults=DEFAULTS)
    else:
        args = arguments.parse_and_validate_args(args_defaults=DEFAULTS)
        if hasattr(argument_utils, "gpt_config_from_args"):
            model, more = argument_utils.gpt_config_from_args(args), {}
        else:  # 0.18
            model, more = None, {"model_provider": build_model}
        pretrain(
            argument_utils.pretrain_cfg_container_from_args(args, model),
            datasets,
            model_type=ModelType.encoder_or_decoder,
            forward_step_func=forward_step,
            **more,
        )
