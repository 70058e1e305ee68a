"""DeepSpeed's configuration for a run of Megatron's GPT: what the flags say goes into the file's "auto" values."""

import argparse
import copy
import difflib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfigError
from pydantic import ValidationError

from s3_megatron.engines.deepspeed.loading import leaves
from s3_megatron.errors import S3Error
from s3_megatron.optim import registry
from s3_megatron.optim.spec import Spec, flag_of

Config = dict[str, Any]

# Which flag's value a key of the file has; the optimizer's are below. A number in the file is the flag's default.
_RUN = {
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_clipping": "clip_grad",
    "bf16.enabled": "bf16",
    "fp16.enabled": "fp16",
}
_RATES = {"optimizer.params.lr": "lr", "optimizer.params.weight_decay": "weight_decay"}
_ADAM = {"optimizer.params.eps": "adam_eps"}
# Sections and values of the file that decide a run; DeepSpeed (0.19.8) passes over a name that it does not know.
_KEYS = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("zero_optimization", "optimizer", "scheduler", "bf16", "fp16", "data_types", "communication_data_type"),
    *("activation_checkpointing", "checkpoint", "prescale_gradients", "steps_per_print"),
)
_STOCK = {"adam": "adam", "adamw": "adam"}  # DeepSpeed's optimizers and Megatron's names for them

# What Megatron's optimizer, its data-parallel wrapper or its checkpoints would do. DeepSpeed does not, so the run would
# pass over the flag in silence.
_MEGATRONS_OWN = (
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
    *("expert_model_parallel_size", "expert_tensor_parallel_size", "num_experts", "mtp_num_layers"),
    *("overlap_grad_reduce", "overlap_param_gather", "overlap_param_gather_with_optimizer_step"),
    *("use_megatron_fsdp", "use_torch_fsdp2", "use_precision_aware_optimizer", "optimizer_cpu_offload"),
    *("optimizer_cuda_graph", "cuda_graph_impl", "fp8", "fp4", "fp8_param_gather", "ddp_bucket_size"),
    *("check_for_large_grads", "check_weight_hash_across_dp_replicas_interval", "calculate_per_token_loss"),
    *("decoupled_lr", "apply_wd_to_qk_layernorm", "use_mup", "qk_clip", "log_max_attention_logit"),
    *("log_num_zeros_in_grad", "log_params_norm", "save_wgrads_interval", "save_dgrads_interval"),
    *("save_params_interval", "save_activations_interval", "save_tokens_per_expert_interval"),
    *("rampup_batch_size", "step_batch_size_schedule", "decrease_batch_size_if_needed", "data_parallel_random_init"),
    *("init_model_with_meta_device", "freeze_all_layers", "async_save", "non_persistent_save_interval", "ckpt_format"),
    *("finetune", "pretrained_checkpoint", "no_save_optim", "no_load_rng", "no_save_rng"),
    *("ckpt_convert_format", "auto_detect_ckpt_format", "use_checkpoint_args", "override_ckpt_iteration"),
    *("num_distributed_optimizer_instances", "empty_unused_memory_level"),
)


class DeepSpeedFlags:
    """``--deepspeed-config FILE``, and what the file decides of Megatron's flags."""

    def __init__(self, argv: list[str]) -> None:
        """Read the file that ``argv`` names, if it names one.

        Raises:
            S3Error: it is not a file with a JSON object, or names an optimizer or scheduler that cannot be had.
        """
        early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        early.add_argument("--deepspeed-config", type=Path)
        early.add_argument("--optimizer")
        given, _ = early.parse_known_args(argv)
        self.path: Path | None = given.deepspeed_config
        self.file: Config = {} if self.path is None else _read(self.path)
        self.optimizer = given.optimizer or self._named() or "adam"
        if self._named() != self.optimizer:
            self.file.pop("optimizer", None)  # a recipe for another optimizer says nothing about this one

    def _named(self) -> str | None:
        kind = self.file.get("optimizer", {}).get("type")
        if kind is None:
            return None
        spec = registry.find(kind)
        name = _STOCK.get(kind.lower()) if spec is None else spec.name
        if name is None:
            known = ", ".join(f'"{spec.title}"' for spec in registry.specs())
            raise S3Error(f'{self.path} has optimizer type {kind!r}: this script trains with {known} or "AdamW"')
        return name

    def add(self, parser: argparse.ArgumentParser) -> None:
        """Add the flag to Megatron's ``parser``; what the file says instead of "auto" becomes the flags' default."""
        parser.add_argument_group("DeepSpeed").add_argument(
            "--deepspeed-config",
            type=Path,
            metavar="FILE",
            help='DeepSpeed\'s JSON; its "auto" values, and what it leaves out of batch sizes, clipping, precision and '
            "optimizer, come from the other flags. Required.",
        )
        # A NaN then stops the run. The other modes do a step's passes again, which has DeepSpeed add the gradients up.
        # Fused accumulation adds to main_grad, which only Megatron's data-parallel wrapper makes.
        parser.set_defaults(optimizer=self.optimizer, rerun_mode="disabled", gradient_accumulation_fusion=False)
        for key, flag in {**_RUN, **_RATES, **_own(registry.find(self.optimizer))}.items():
            value = _get(self.file, key)
            if value not in (None, "auto"):
                parser.set_defaults(**{flag: value})
        self._defaults = {name: parser.get_default(name) for name in (*_MEGATRONS_OWN, "rerun_mode")}

    def check(self, args: argparse.Namespace) -> None:
        """Check flags that are parsed but not validated.

        Raises:
            S3Error: a flag is missing, or asks for what DeepSpeed does not do here.
        """
        if self.path is None:
            raise S3Error("--deepspeed-config FILE is missing: configs/deepspeed/ has one for each ZeRO stage")
        if registry.find(args.optimizer) is None and args.optimizer not in _STOCK.values():
            known = ", ".join(spec.name for spec in registry.specs())
            raise S3Error(f"--optimizer {args.optimizer} does not work with DeepSpeed here: give {known} or adam")
        for name, default in self._defaults.items():
            if getattr(args, name) != default:
                raise S3Error(
                    f"{flag_of(name)} {getattr(args, name)} does nothing under DeepSpeed, which shards "
                    "and saves in its own way over data-parallel ranks only: drop the flag, or use "
                    "s3_megatron.train.pretrain_gpt"
                )
        _refuse_settings_of_the_rest(args)

    def complete(self, args: argparse.Namespace) -> Config:
        """Fill the file's configuration from validated ``args``.

        Raises:
            S3Error: the file and a flag contradict each other, or an "auto" is left that no flag gives.
        """
        if "scheduler" in self.file:
            raise S3Error(f"{self.path} has a scheduler: the rate follows --lr-decay-style here, so leave it out")
        config = copy.deepcopy(self.file)
        for key, (value, flag) in _wanted(args).items():
            found = _get(config, key)
            if found in (None, "auto"):
                _set(config, key, value)
            elif found != value:
                raise S3Error(
                    f"{self.path} has {key} = {json.dumps(found)} and {flag_of(flag)} makes it "
                    f'{json.dumps(value)}: make them agree, or write "auto" in the file'
                )
        spec = registry.find(args.optimizer)
        config["optimizer"]["type"] = "AdamW" if spec is None else spec.title
        config.setdefault("steps_per_print", 2**31)  # Megatron's loop logs
        _refuse_mixed_stage_0(config, self.path)
        left = [key for key, value in leaves(config) if value == "auto"]
        if left:
            raise S3Error(f'{self.path} has "auto" for {", ".join(left)}, which no flag gives: write a number')
        return config


@contextmanager
def refusals(path: Path) -> Iterator[None]:
    """Turn what DeepSpeed raises of the configuration that began as ``path`` into S3Error."""
    try:
        yield
    except ValidationError as error:
        wrong = "; ".join(
            f"{error.title}: {'.'.join(map(str, each['loc']))} = {each['input']!r}: {each['msg']}"
            for each in error.errors(include_url=False)
        )
        raise S3Error(f"DeepSpeed refuses {path}: {wrong}") from error
    except DeepSpeedConfigError as error:
        raise S3Error(f"DeepSpeed refuses {path}: {' '.join(str(error).split())}") from error


def _refuse_mixed_stage_0(config: Config, path: Path | None) -> None:
    """Raise S3Error where DeepSpeed's ``_do_optimizer_sanity_check`` (0.19.8) raises NotImplementedError, later."""
    stage = _get(config, "zero_optimization.stage")
    is_mixed = _get(config, "bf16.enabled") and _get(config, "data_types.grad_accum_dtype") == "fp32"
    if is_mixed and not stage:
        what = "no zero_optimization.stage, and so ZeRO stage 0" if stage is None else "ZeRO stage 0"
        raise S3Error(
            f"{path} has {what}, which does not accumulate gradients of bf16 in float32 as Megatron does: "
            "set zero_optimization.stage to 1, or pass --grad-reduce-in-bf16"
        )


def _refuse_settings_of_the_rest(args: argparse.Namespace) -> None:
    """Raise S3Error for what an optimizer of matrices is asked in Megatron alone: under DeepSpeed it has S3 beside it.

    That one has its defaults there, and tensor parallelism there is none.
    """
    spec = registry.find(args.optimizer)
    if spec is None or not spec.beside:
        return
    asked = [(spec, each) for each in spec.engine if each.name != "split_qkv"]
    asked += [(beside, each) for beside in spec.beside for each in beside.hyperparameters]
    for owner, each in asked:
        value = getattr(args, owner.field(each.name))
        if value != each.default:
            raise S3Error(
                f"{owner.flag(each.switch)} does nothing under DeepSpeed with --optimizer {spec.name}, which has S3 "
                "with its defaults beside it, and no tensor parallelism: drop the flag, or use "
                "s3_megatron.train.pretrain_gpt"
            )


def _wanted(args: argparse.Namespace) -> dict[str, tuple[Any, str]]:
    """Give key: (value, flag) for all that the flags decide."""
    accumulation = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    wanted = {key: (getattr(args, flag), flag) for key, flag in {**_RUN, **_RATES}.items()}
    wanted["gradient_accumulation_steps"] = (accumulation, "global_batch_size")
    if args.fp16:
        scale = int(args.loss_scale or 0)
        wanted["fp16.loss_scale"] = (scale, "loss_scale")
        wanted["fp16.initial_scale_power"] = (int(args.initial_loss_scale).bit_length() - 1, "initial_loss_scale")
        wanted["fp16.loss_scale_window"] = (args.loss_scale_window, "loss_scale_window")
        wanted["fp16.hysteresis"] = (args.hysteresis, "hysteresis")
        wanted["fp16.min_loss_scale"] = (args.min_loss_scale, "min_loss_scale")
    if (args.bf16 or args.fp16) and args.accumulate_allreduce_grads_in_fp32:
        # As Megatron does. DeepSpeed's default is the model's dtype for both.
        flag = "accumulate_allreduce_grads_in_fp32"
        wanted["data_types.grad_accum_dtype"] = wanted["communication_data_type"] = ("fp32", flag)
    spec = registry.find(args.optimizer)
    if spec is None:
        wanted |= {key: (getattr(args, flag), flag) for key, flag in _ADAM.items()}
        wanted["optimizer.params.betas"] = ([args.adam_beta1, args.adam_beta2], "adam_beta1")
        if get_accelerator().device_name() == "cpu":  # FusedAdam needs a GPU
            wanted["optimizer.params.torch_adam"] = (True, "optimizer")
    else:
        values = {each.name: getattr(args, spec.field(each.name)) for each in spec.hyperparameters}
        wanted |= {key: (getattr(args, flag), flag) for key, flag in _params(spec, spec.chosen(values)).items()}
    return wanted


def _own(spec: Spec | None) -> dict[str, str]:
    """Which flag's value a param of the optimizer has; None stands for Adam."""
    if spec is None:
        return _ADAM
    return _params(spec, [each.name for each in spec.hyperparameters])


def _params(spec: Spec, names: Iterable[str]) -> dict[str, str]:
    """Which flag's value the params ``names`` of ``spec`` have, and its switches."""
    flags = {name: spec.field(name) for name in names} | {field: field for field in spec.switch_fields}
    return {f"optimizer.params.{name}": flag for name, flag in flags.items()}


def _read(path: Path) -> Config:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise S3Error(f"--deepspeed-config {path} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise S3Error(f"--deepspeed-config {path} holds no JSON object")
    for key in config.keys() - set(_KEYS):
        if meant := difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.85):
            raise S3Error(f"{path} has {key!r}, which DeepSpeed passes over: did you mean {meant[0]!r}?")
    return config


def _get(config: Config, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _set(config: Config, key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        config = config.setdefault(section, {})
    config[name] = value
