"""From a job to the command line of its ranks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from s3_megatron.jobs.catalog import find
from s3_megatron.jobs.job import Job
from s3_megatron.jobs.recipe import AdamW, Data, OwnOptimizer
from s3_megatron.optim.spec import flag_of
from s3_megatron.run_folder import RunFolder

ENTRIES = {"megatron": "s3_megatron.train.pretrain_gpt", "deepspeed": "s3_megatron.train.pretrain_gpt_deepspeed"}

# What Megatron needs where neither Transformer Engine nor Apex is installed; the rehearsal adds its own.
WITHOUT_ACCELERATIONS = {
    "transformer_impl": "local",
    "no_persist_layer_norm": True,
    "no_gradient_accumulation_fusion": True,
    "no_masked_softmax_fusion": True,
    "no_rope_fusion": True,
}
_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective"},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def megatron_flags(job: Job, run: Path) -> list[list[str]]:
    """The flags of the entry that trains ``job`` in the folder ``run``: one list a flag, the flag and its values."""
    recipe, layout, folder = job.recipe, job.recipe.layout, RunFolder(run)
    model = recipe.model.model_dump(exclude={"vocab_size"}, exclude_none=True)
    schedule = recipe.schedule.model_dump(
        exclude={"min_lr_ratio", "lr_decay_iters", "micro_batch_size"}, exclude_none=True
    )
    settings: list[Mapping[str, Any]] = [
        {**model, "max_position_embeddings": recipe.model.seq_length},
        {"micro_batch_size": job.micro_batch_size, **schedule},
        {"lr_decay_iters": recipe.schedule.lr_decay_iters or recipe.schedule.train_iters},
        optimizer(recipe.optimizer, recipe.schedule.min_lr_ratio),
        {"bf16": recipe.precision == "bf16"},
        {
            "tensor_model_parallel_size": layout.tensor,
            "pipeline_model_parallel_size": layout.pipeline,
            "context_parallel_size": layout.context,
            "sequence_parallel": layout.sequence_parallel,
            **_RECOMPUTE[layout.recompute],
        },
        _engine(job, folder),
        {} if job.rehearsed or job.cluster.transformer_engine else WITHOUT_ACCELERATIONS,
        _data(recipe.data, Path(job.cluster.data_dir), recipe.model.vocab_size),
        {
            **recipe.checkpoint.model_dump(exclude_none=True),
            "save": folder.checkpoints,
            "load": folder.checkpoints,
            "data_cache_path": folder.cache,
            "watch_dir": folder.watch,
            **recipe.log.model_dump(),
            "exit_signal_handler": True,
        },
    ]
    return [*(words for part in settings for words in _spelled(part)), *([flag] for flag in recipe.flags)]


def optimizer(chosen: OwnOptimizer | AdamW, min_lr_ratio: float) -> dict[str, Any]:
    """Megatron's settings for an optimizer; ``min_lr_ratio`` is the last rate's share of the peak."""
    rates = {"lr": chosen.lr, "min_lr": chosen.lr * min_lr_ratio, "weight_decay": chosen.decay}
    if isinstance(chosen, AdamW):
        return {"optimizer": "adam", **rates, "adam_beta1": chosen.beta1, "adam_beta2": chosen.beta2}
    spec = chosen.spec
    given = dict(chosen)
    values = spec.chosen(given) | {each.name: given[each.name] for each in spec.engine}
    own = {
        spec.field(each.switch): values[each.name] != each.default if each.kind is bool else values[each.name]
        for each in (*spec.hyperparameters, *spec.engine)
        if each.name in values
    }
    return {"optimizer": spec.name, **rates, **own}


def deepspeed_file(job: Job) -> Path:
    """The JSON file that ``job`` gives DeepSpeed; raises S3Error where there is none."""
    return find("deepspeed", job.recipe.deepspeed, ".json")


def _engine(job: Job, folder: RunFolder) -> dict[str, Any]:
    if job.recipe.engine == "deepspeed":
        return {"deepspeed_config": folder.deepspeed}
    return {"use_distributed_optimizer": True, "ckpt_format": "torch_dist"}


def _data(data: Data, folder: Path, vocab_size: int) -> dict[str, Any]:
    if data.mock:
        # Megatron's NullTokenizer adds one token, the end of a document, to the size that it is given (0.19.2).
        return {"mock_data": True, "tokenizer_type": "NullTokenizer", "vocab_size": vocab_size - 1}
    assert data.train is not None and data.validation is not None, "the recipe's schema asks for them"
    files = {"train_data_path": folder / data.train, "valid_data_path": folder / data.validation}
    if data.tokenizer_model is not None:
        return {**files, "tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": folder / data.tokenizer_model}
    name = data.tokenizer.removeprefix("hf:")
    return {**files, "tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": name}


def _spelled(settings: Mapping[str, Any]) -> list[list[str]]:
    """Spell settings as flags: ``num_layers: 4`` is ``--num-layers 4``, True a flag alone, False none."""
    return [[flag_of(key), *_words(value)] for key, value in settings.items() if value is not False]


def _words(value: Any) -> list[str]:
    if value is True:
        return []
    return [_text(one) for one in value] if isinstance(value, tuple) else [_text(value)]


def _text(value: Any) -> str:
    return f"{value:.12g}" if isinstance(value, float) else str(value)  # 0.0003, not 0.00030000000000000003
