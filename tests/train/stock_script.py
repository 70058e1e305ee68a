"""A person's own pretraining script, which knows nothing of this package: GPT on Megatron's mock data."""

import helper_of_stock_script  # beside the script, as python allows
import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.training import get_args, get_tokenizer, pretrain, print_rank_0
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args


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


if __name__ == "__main__":
    datasets.is_distributed = True
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "NullTokenizer"})
    print_rank_0(f"stock script: {helper_of_stock_script.GREETING}")
    pretrain(
        pretrain_cfg_container_from_args(args, gpt_config_from_args(args)),
        datasets,
        ModelType.encoder_or_decoder,
        forward_step,
    )
