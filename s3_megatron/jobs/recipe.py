"""A recipe: what is trained, independent of where. Every key's unit is in its name, or in its description."""

import functools
import math
import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, create_model, model_validator

from s3_megatron.errors import S3Error
from s3_megatron.jobs.schema import Name, Section, Text
from s3_megatron.optim import registry
from s3_megatron.optim.spec import Spec

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Model(Section):
    """GPT-2's architecture: learned positions, LayerNorm, GELU, output tied to the embedding."""

    num_layers: Count
    hidden_size: Count
    num_attention_heads: Count
    ffn_hidden_size: Count | None = Field(None, description="null: 4 hidden_size")
    seq_length: Count = Field(description="tokens")
    vocab_size: Count = Field(description="of the tokenizer; Megatron pads it")
    attention_dropout: Share = 0.1
    hidden_dropout: Share = 0.1

    @property
    def ffn_size(self) -> int:
        """The width of the feed-forward layer."""
        return self.ffn_hidden_size or 4 * self.hidden_size


class Data(Section):
    """Token files (prefixes without .bin and .idx) and tokenizer; relative paths begin at the cluster's data_dir."""

    mock: bool = Field(False, description="random tokens instead of files: to try a job")
    train: Text | None = None
    validation: Text | None = None
    tokenizer: Text = Field("sentencepiece", description="sentencepiece, gpt2 or hf:NAME")
    tokenizer_model: Text | None = Field(None, description="the SentencePiece model's file")

    @model_validator(mode="after")
    def _is_there(self) -> Self:
        if not self.mock and (self.train is None or self.validation is None):
            raise ValueError("name the files of data.train and data.validation, or set data.mock=true")
        if not self.mock and self.tokenizer == "sentencepiece" and self.tokenizer_model is None:
            raise ValueError("data.tokenizer sentencepiece needs the file data.tokenizer_model")
        return self


class Schedule(Section):
    """How long and how fast."""

    global_batch_size: Count = Field(description="sequences a step, over all ranks")
    micro_batch_size: Count | None = Field(None, description="sequences a rank takes at once; null: its whole share")
    train_iters: Count
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "cosine"
    lr_decay_iters: Count | None = Field(None, description="null: train_iters")
    lr_wsd_decay_iters: Count | None = Field(None, description="the last part, in which WSD decays; for WSD only")
    lr_warmup_iters: int = Field(0, ge=0)
    min_lr_ratio: Share = Field(0.1, description="the last rate, as a share of the peak")
    clip_grad: float = Field(1.0, ge=0, description="largest norm of the gradient; 0: no clipping")
    seed: Count = 1234
    eval_interval: Count = 1000
    eval_iters: int = Field(10, ge=0)

    @model_validator(mode="after")
    def _decays_as_it_says(self) -> Self:
        last, whole = self.lr_wsd_decay_iters, self.lr_decay_iters or self.train_iters
        if (self.lr_decay_style == "WSD") != (last is not None):
            raise ValueError(
                f"schedule.lr_wsd_decay_iters {'is missing' if last is None else last}, and schedule.lr_decay_style is "
                f"{self.lr_decay_style}: give both, as in lr_decay_style=WSD lr_wsd_decay_iters={whole // 10 or 1}, or "
                "neither"
            )
        if last is not None and last + self.lr_warmup_iters > whole:
            raise ValueError(
                f"schedule.lr_wsd_decay_iters {last} and schedule.lr_warmup_iters {self.lr_warmup_iters} are more than "
                f"the {whole} iterations of the schedule"
            )
        return self


class Layout(Section):
    """How the ranks share the work; data parallelism is what tensor, pipeline and context leave."""

    nodes: Count = 1
    tensor: Count = 1
    pipeline: Count = 1
    context: Count = 1
    sequence_parallel: bool = Field(False, description="shares activations among the tensor ranks too; not on CPUs")
    recompute: Literal["none", "selective", "full"] = "none"


class Checkpoint(Section):
    """How often the run is saved."""

    save_interval: Count = Field(description="iterations: at most so many are lost")
    save_retain_interval: Count | None = Field(
        None, description="iterations; older checkpoints stay only at its multiples; null: all stay"
    )


class Log(Section):
    """How often the run speaks."""

    log_interval: Count = 10


class Rates(Section):
    """The AdamW setting that a recipe's rates come from."""

    lr: Positive
    weight_decay: Decay


class OwnOptimizer(Section):
    """An optimizer of this package, by its own numbers and the AdamW setting that its weight decay follows from."""

    name: str
    lr: Positive = Field(description="peak")
    weight_decay: Decay | None = Field(None, description="null: the paper's rule, adamw.lr * adamw.weight_decay / lr")
    adamw: Rates

    @property
    def decay(self) -> float:
        """The weight decay in use: given, or by the paper's rule, so that a step decays as much as AdamW's."""
        if self.weight_decay is not None:
            return self.weight_decay
        return float(f"{self.adamw.lr * self.adamw.weight_decay / self.lr:.12g}")  # 0.01, not 0.010000000000000002

    @property
    def spec(self) -> Spec:
        """What it is made of."""
        spec = registry.find(self.name)
        assert spec is not None, "the schema is made of the Specs"
        return spec

    def complete(self, steps: int) -> Mapping[str, Any]:
        """Give the hyperparameters in a run of ``steps``, by name; raises S3Error where they do not go together."""
        values = dict(self)
        return self.spec.complete({each.name: values[each.name] for each in self.spec.hyperparameters}, steps)


def section(spec: Spec) -> type[OwnOptimizer]:
    """Make the section of a recipe that names ``spec``, with a key for each of its settings."""
    fields: dict[str, Any] = {"name": (Literal[spec.name], ...)}
    for each in (*spec.hyperparameters, *spec.engine):
        value: Any = Literal[each.choices] if each.choices else each.kind
        if each.range is not None:
            limit = None if math.isinf(each.range.high) else each.range.high
            below, most = (None, limit) if each.range.includes_high else (limit, None)
            least, above = (each.range.low, None) if each.range.includes_low else (None, each.range.low)
            infinite = each.range.holds(math.inf)  # and NaN is not >= the least
            value = Annotated[each.kind, Field(ge=least, gt=above, lt=below, le=most, allow_inf_nan=infinite)]
        if each.count > 1:
            value = tuple[value, value]
        if each.default is None:
            value = value | None
        fields[each.name] = (value, Field(each.default, description=each.help))
    return create_model(spec.title, __base__=OwnOptimizer, **fields)


class AdamW(Section):
    """AdamW, for comparison."""

    name: Literal["adamw"]
    lr: Positive = Field(description="peak")
    weight_decay: Decay
    beta1: Share = 0.9
    beta2: Share = 0.999

    @property
    def decay(self) -> float:
        """The weight decay in use."""
        return self.weight_decay


_OWN = [section(spec) for spec in registry.OWN]
# What a union's member is called in a file.
OPTIMIZERS = (*(spec.name for spec in registry.OWN), "adamw")
if TYPE_CHECKING:
    type Optimizer = OwnOptimizer | AdamW
else:
    Optimizer = functools.reduce(operator.or_, [*_OWN, AdamW])

_FOLDER = "a job saves to, and resumes from, its run folder, where status looks too"
_WHOLE = "every start of a job must go on with all that the one before has saved"
# Megatron's flags (0.19.2) that would take from a job what its restarts, `status` or the node agent rely on.
_NOT_FOR_JOBS = {
    "--save": _FOLDER,
    "--load": _FOLDER,
    "--watch-dir": _FOLDER,
    "--ckpt-format": "the node agent and status know torch_dist (engine=deepspeed: DeepSpeed's own format) only",
    "--ckpt-convert-format": "a job that converts checkpoints trains nothing",
    "--ckpt-step": "every start of a job goes on from the newest whole checkpoint",
    "--finetune": "every start of a job would begin with iteration 0 again",
    "--no-save-optim": _WHOLE,
    "--no-load-optim": _WHOLE,
    "--no-save-rng": _WHOLE,
    "--no-load-rng": _WHOLE,
    "--exit-duration-in-mins": "cluster.restart.save_margin_minutes says when training ends",
}


class Recipe(Section):
    """Everything that decides what is trained."""

    name: Name
    engine: Literal["megatron", "deepspeed"] = "megatron"
    deepspeed: Text = Field("zero1", description="a file of configs/deepspeed, or a path; only for engine deepspeed")
    model: Model
    data: Data
    schedule: Schedule
    precision: Literal["bf16", "fp32"] = "bf16"
    layout: Layout = Layout()
    checkpoint: Checkpoint
    log: Log = Log()
    optimizer: Annotated[Optimizer, Field(discriminator="name")]
    flags: tuple[Text, ...] = Field((), description="more of Megatron's flags, as they are, behind all others")

    @model_validator(mode="after")
    def _goes_with_its_length(self) -> Self:
        if isinstance(self.optimizer, OwnOptimizer):
            try:
                self.optimizer.complete(self.schedule.train_iters)
            except S3Error as error:
                raise ValueError(f"optimizer: {error}") from error
        return self

    @model_validator(mode="after")
    def _resumes(self) -> Self:
        for flag in self.flags:
            if reason := _NOT_FOR_JOBS.get(flag.partition("=")[0]):
                raise ValueError(f"flags has {flag}, but {reason}: leave it out")
        return self
