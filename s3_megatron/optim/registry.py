"""The optimizers of this package, each by its Spec. Imports no torch: recipes are read on login nodes."""

from collections.abc import Mapping
from typing import Any

from s3_megatron.errors import S3Error
from s3_megatron.optim.spec import Hyperparameter, Range, Spec
from s3_megatron.optim.state import EXP_AVG, EXP_AVG_ROOT, s3_from_adam
from s3_megatron.optim.temperature import phases

_BETA, _PAPERS_BETA = Range(0, 1), "0.95 is the paper's"

S3 = Spec(
    name="s3",
    optimizer="s3_megatron.optim.s3:S3",
    source="arXiv 2507.06464",
    state={EXP_AVG: "m", EXP_AVG_ROOT: "s^(1/p)"},
    hyperparameters=(
        Hyperparameter(
            *("beta", 0.95, "decay of both averages, m and s"),
            range=_BETA,
            defines_state=True,
            key="betas",
            hint=_PAPERS_BETA,
        ),
        Hyperparameter(
            *("p", 3.0, "exponent of the denominator; 1, 2 and 3 are the fast ones"),
            range=Range(1),
            defines_state=True,
            hint="3 is the paper's",
        ),
        Hyperparameter(
            *("betas", None, "the two decays apart, for ablations; overrides beta, and an update may exceed 1"),
            count=2,
            range=_BETA,
            defines_state=True,
            hint=_PAPERS_BETA,
        ),
        Hyperparameter("nesterov", True, "look ahead one step", kind=bool, defines_state=True),
    ),
    from_adam=s3_from_adam,
    from_adam_help="m as is, r = sqrt(v)",
)


def _phases(hard: str) -> tuple[Hyperparameter, ...]:
    """List what says when a run is soft; ``hard`` is what the optimizer is called in the hard phase."""
    return (
        Hyperparameter(
            *(
                "total_steps",
                None,
                "steps of the run; none: --train-iters, or in DeepSpeed the scheduler's total_num_steps",
            ),
            kind=int,
            range=Range(1),
        ),
        Hyperparameter(
            *("soft_start", 0.9, f"share of the run that is hard; at 1 every step is ({hard})"),
            range=Range(0, 1, includes_high=True),
            hint="0.9 is usual",
        ),
        Hyperparameter("sign_iters", None, "hard steps; in the place of the share", kind=int, range=Range(0)),
        # Without a range: a run without soft steps has a 0 in its param groups.
        Hyperparameter(
            *("transition_iters", None, "soft steps, >= 1; with the hard ones, in the place of the length"), kind=int
        ),
    )


_TEMPERATURE = (
    Hyperparameter(
        *("eps", 1e-4, "how far the map stays below 1 at each quantile of the momentum"),
        range=Range(0, 1, includes_low=False),
        hint="1e-4 is the paper's",
    ),
    Hyperparameter(
        *("tmax", 1e9, "the highest temperature"),
        range=Range(1, includes_high=True),
        hint="1e9 leaves the first soft step hard",
    ),
)


def _with_length(values: Mapping[str, Any], steps: int | None) -> Mapping[str, Any]:
    """Take the length of the host's run where nothing says when it is soft; raises S3Error for bad phases."""
    if values["total_steps"] is None and values["transition_iters"] is None:
        values = {**values, "total_steps": steps}
    phases(*(values[name] for name in ("total_steps", "soft_start", "sign_iters", "transition_iters")))
    return values


SOFTSIGNUM = Spec(
    name="softsignum",
    optimizer="s3_megatron.optim.softsignum:SoftSignum",
    source="arXiv 2605.31371",
    state={EXP_AVG: "m"},
    hyperparameters=(
        Hyperparameter(*("beta", 0.9, "decay of the average m"), range=_BETA, defines_state=True, hint="0.9 is usual"),
        Hyperparameter("nesterov", False, "look ahead one step", kind=bool, defines_state=True),
        *_phases("Signum"),
        *_TEMPERATURE,
    ),
    complete=_with_length,
)

SOFTMUON = Spec(
    name="softmuon",
    optimizer="s3_megatron.optim.softmuon:SoftMuon",
    source="arXiv 2605.31371",
    state={EXP_AVG: "m"},
    hyperparameters=(
        Hyperparameter(
            *("beta", 0.95, "decay of the average m"), range=_BETA, defines_state=True, hint="0.95 is usual"
        ),
        Hyperparameter("nesterov", True, "look ahead one step", kind=bool, defines_state=True),
        *_phases("Muon"),
        *_TEMPERATURE,
        Hyperparameter(
            *("scale_mode", "spectral", "what an update is multiplied by, as Megatron's Muon has it"),
            kind=str,
            choices=("spectral", "unit_rms_norm", "shape_scaling"),
            defines_state=True,
        ),
        Hyperparameter(
            *("extra_scale_factor", 0.2, "and this; 0.2 with spectral makes updates as long as AdamW's"),
            range=Range(0, includes_low=False),
            defines_state=True,
        ),
        Hyperparameter(
            *("coefficient_type", "quintic", "the hard step's polynomials"),
            kind=str,
            choices=("simple", "quintic", "polar_express", "cans", "aol", "deepseekv4"),
            defines_state=True,
        ),
        Hyperparameter(
            *("num_ns_steps", 5, "and how many of them"),
            kind=int,
            range=Range(1),
            defines_state=True,
            hint="5 is Muon's",
        ),
        Hyperparameter(
            *("fp32_matmul_prec", "medium", "products in bfloat16 where that is close enough, or in float32"),
            kind=str,
            choices=("medium", "highest"),
            defines_state=True,
        ),
    ),
    complete=_with_length,
    beside=(S3, SOFTSIGNUM),
    engine=(
        Hyperparameter(
            *("scalar_optimizer", "s3", "what moves embeddings, the output layer, norms and biases"),
            kind=str,
            choices=("s3", "adam", "softsignum"),
        ),
        Hyperparameter(
            *("tp_mode", "duplicated", "how a matrix that tensor-parallel ranks share is mapped"),
            kind=str,
            choices=("duplicated", "distributed", "blockwise"),
        ),
        Hyperparameter("split_qkv", True, "map Q, K and V of a fused weight apart", kind=bool),
    ),
    road=("tp_mode", "split_qkv", "qkv_split_shapes"),
)

# Those of this package; each has a configuration for Megatron-Bridge, by its title.
OWN = (S3, SOFTSIGNUM, SOFTMUON)
_specs = {spec.name: spec for spec in OWN}


def specs() -> tuple[Spec, ...]:
    """List all Specs, in the order in which they were added."""
    return tuple(_specs.values())


def add(spec: Spec) -> None:
    """Make ``spec`` known in this process; engines that are installed already know it from now on, too.

    Raises:
        S3Error: its name is in use.
    """
    if _specs.setdefault(spec.name, spec) is not spec:
        raise S3Error(f"there is an optimizer {spec.name} already: give the Spec another name")


def find(name: object) -> Spec | None:
    """Give the Spec that Megatron's ``--optimizer`` or, in any case of letters, DeepSpeed's ``type`` names, if any."""
    return _specs.get(name.lower()) if isinstance(name, str) else None


def title(name: str) -> str:
    """Give the class's name of the optimizer ``name``, which may be of a later version and not known here."""
    spec = _specs.get(name)
    return name if spec is None else spec.title
