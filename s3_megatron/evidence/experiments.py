"""An experiment as its file says it: what is trained, by which contenders, with which grids, seeds and budget."""

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, get_args, get_type_hints

from s3_megatron.data.tokenizer_training import FIXED_PIECES
from s3_megatron.errors import S3Error
from s3_megatron.evidence import reading
from s3_megatron.evidence.contenders import CONTENDERS
from s3_megatron.evidence.stack import Model
from s3_megatron.evidence.text import BYTES

# Marks a setting that came after the first experiment had begun: at its default it is left out of the hash of the
# rules, so that older cells go on.
LATER = {"later": True}


@dataclass(frozen=True)
class Setup:
    """What all contenders of a comparison have in common."""

    steps: int
    layers: int = 4
    width: int = 128
    heads: int = 4
    length: int = 128
    qk_norm: bool = False
    batch: int = 16
    schedule: str = "cosine"  # to 0; or constant
    warmup: float = 0.05  # of the steps
    clip: float = 1.0  # each member's gradient norm; 0 does not clip
    decay: float = 3e-4  # peak rate times weight decay
    validation: int = 1 << 18  # tokens
    watch_every: int = 20  # steps between two looks at |u|
    kick: float = 1.0  # factor of one step's gradient
    kick_step: int = -1
    products: str = "float32"  # dtype of matrix products
    vocabulary: int = field(default=BYTES, metadata=LATER)  # of bytes, or of SentencePiece's tokens

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        for name in ("steps", "layers", "width", "heads", "length", "batch", "watch_every"):
            _require(getattr(self, name) > 0, f"{name} {getattr(self, name)}", "> 0")
        _require(self.width % self.heads == 0, f"width {self.width}", f"a multiple of heads ({self.heads})")
        _require(self.schedule in ("cosine", "constant"), f"schedule {self.schedule}", "cosine or constant")
        _require(self.products in ("float32", "bfloat16"), f"products {self.products}", "float32 or bfloat16")
        _require(0 <= self.warmup < 1, f"warmup {self.warmup}", "a share of the steps in [0, 1)")
        _require(self.clip >= 0 and self.decay >= 0, "clip and decay", ">= 0")
        kicks = self.kick != 1 or self.kick_step != -1
        _require(not kicks or 0 <= self.kick_step < self.steps, f"kick_step {self.kick_step}", "one of the steps")
        looks = f"watch_every {self.watch_every}"
        _require(not kicks or self.watch_every == 1, looks, "1 with a kick_step, after which steps are counted")
        least = self.length + 1  # the last token is a target alone
        _require(self.validation >= least, f"validation {self.validation}", f"one sequence, {least} tokens, at least")
        allowed = f"{BYTES} for bytes, or more than {FIXED_PIECES} for SentencePiece"
        _require(self.vocabulary == BYTES or self.vocabulary > FIXED_PIECES, f"vocabulary {self.vocabulary}", allowed)

    @property
    def model(self) -> Model:
        """The model that is trained."""
        return Model(self.layers, self.width, self.heads, self.length, self.qk_norm, self.vocabulary)

    def rate_factor(self, step: int) -> float:
        """Return the share of the peak rate in a step, counted from 0."""
        warm = round(self.warmup * self.steps)
        if step < warm:
            return (step + 1) / warm
        if self.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / (self.steps - warm)))


@dataclass(frozen=True)
class Entry:
    """A contender in an experiment."""

    optimizer: str
    rates: list[float]
    settings: dict[str, Any] = field(default_factory=dict)
    sweep: dict[str, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse an unknown optimizer, and grids without order."""
        _require(self.optimizer in CONTENDERS, f"optimizer {self.optimizer}", f"one of {', '.join(CONTENDERS)}")
        known = CONTENDERS[self.optimizer].settings  # some libraries take any name, and pass it over
        for name in (*self.settings, *self.sweep):
            _require(name in known, f"setting {name} of {self.optimizer}", f"one of {', '.join(known)}")
        rising = all(a < b for a, b in zip(self.rates, self.rates[1:], strict=False))
        _require(bool(self.rates) and self.rates[0] > 0 and rising, f"rates {self.rates}", "positive and rising")


@dataclass(frozen=True)
class Tuning:
    """How much tuning every contender gets: ``runs``, with one ``seed``, or each configuration with all ``seeds``."""

    seed: int | None = None
    runs: int = field(kw_only=True)
    # Few rounds of many runs, for a card, where runs side by side cost little; the rule is in docs/evidence.md.
    wide: bool = field(default=False, metadata=LATER)
    seeds: list[int] = field(default_factory=list, metadata=LATER)

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        _require((self.seed is None) == bool(self.seeds), "seed and seeds", "one of the two")
        _require(len(set(self.seeds)) == len(self.seeds), f"seeds {self.seeds}", "distinct")
        _require(self.runs > 0, f"runs {self.runs}", "> 0")
        many = len(self.all_seeds)
        _require(self.runs % many == 0, f"runs {self.runs}", f"a multiple of {many}: each choice is run with all seeds")

    @property
    def all_seeds(self) -> list[int]:
        """The seeds that every configuration is run with; the best is that of the lowest mean over them."""
        return self.seeds if self.seed is None else [self.seed]

    @property
    def configurations(self) -> int:
        """How many configurations a contender's runs suffice for."""
        return self.runs // len(self.all_seeds)


@dataclass(frozen=True)
class Experiment:
    """A comparison. Without ``tuning``, every contender runs all of its rates with every seed."""

    name: str
    title: str
    reference: str  # the contender that the others are compared with
    text: str
    setups: dict[str, Setup]
    seeds: list[int]
    contenders: dict[str, Entry]
    tuning: Tuning | None = None
    factor: float = 2.0  # between neighbouring rates
    neighbours: int = 0  # how many of the seeds run the rates beside the best, too
    paper: dict[str, str] = field(default_factory=dict)  # what the paper has for a contender, with its rates

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        _require(
            self.reference in self.contenders, f"reference {self.reference}", f"one of {', '.join(self.contenders)}"
        )
        _require(bool(self.setups), "setups", "one at least")
        vocabularies = {setup.vocabulary for setup in self.setups.values()}
        _require(len(vocabularies) == 1, f"the setups' vocabulary {sorted(vocabularies)}", "one, since the text is")
        tuned = self.tuning.all_seeds if self.tuning else []
        are_seeds = all(0 <= seed < 1 << 31 for seed in self.seeds)
        _require(bool(self.seeds) and are_seeds, f"seeds {self.seeds}", "from 0 to 2147483647, and one at least")
        _require(len(set(self.seeds)) == len(self.seeds), f"seeds {self.seeds}", "distinct")
        _require(self.factor > 1, f"factor {self.factor}", "> 1")
        for name in self.paper:
            _require(name in self.contenders, f"paper.{name}", f"one of {', '.join(self.contenders)}")
        if self.tuning:
            for seed in tuned:
                _require(0 <= seed < 1 << 31, f"tuning seed {seed}", "from 0 to 2147483647")
                _require(
                    seed not in self.seeds,
                    f"seed {seed} is for tuning and among seeds",
                    "in one of the two: what was tuned on proves nothing",
                )
            for name, entry in self.contenders.items():
                each = f" by {len(tuned)} seeds" if len(tuned) > 1 else ""
                _require(
                    len(entry.rates) <= self.tuning.configurations,
                    f"contenders.{name} has {len(entry.rates)} rates{each}",
                    f"at most tuning.runs ({self.tuning.runs})",
                )

    @property
    def vocabulary(self) -> int:
        """How many tokens the text is made of."""
        return next(iter(self.setups.values())).vocabulary

    @property
    def sha256(self) -> str:
        """The hash of all that decides a run or a ranking; what title, paper and comments say does not."""
        content = rules(self)
        del content["title"], content["paper"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def rules(part: Any) -> Any:
    """Return a dataclass as dicts and lists without what is LATER and at its default."""
    if dataclasses.is_dataclass(part):
        kept = [f for f in dataclasses.fields(part) if not f.metadata or getattr(part, f.name) not in (f.default, [])]
        return {f.name: rules(getattr(part, f.name)) for f in kept}
    if isinstance(part, dict):
        return {key: rules(value) for key, value in part.items()}
    return [rules(value) for value in part] if isinstance(part, list) else part


def load(name: str) -> Experiment:
    """Read an experiment by its name under configs/experiments, or by its file's path.

    Raises:
        S3Error: there is none, or a key or value is wrong; the text names the key.
    """
    path, content = reading.source(name), reading.read(name)
    try:
        if isinstance(content.get("contenders"), dict):
            content["contenders"] = dict(_expanded(content["contenders"]))
        experiment: Experiment = _build(Experiment, {"name": path.stem, **content}, "")
        return experiment
    except S3Error as error:
        raise S3Error(f"{path.name}: {error}") from None


def _expanded(contenders: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Make a contender of each combination of an entry's ``each``, a list of values by setting.

    It is named by them: s3-p2-beta0.95-no-nesterov.
    """
    for name, entry in contenders.items():
        if not isinstance(entry, dict) or "each" not in entry:
            yield name, entry
            continue
        rest = {key: value for key, value in entry.items() if key != "each"}
        each = entry["each"]
        if not isinstance(each, dict) or not all(isinstance(values, list) for values in each.values()):
            raise S3Error(f"contenders.{name}.each is {each!r}: it must be a mapping of settings to lists of values")
        for values in itertools.product(*each.values()):
            chosen = dict(zip(each, values, strict=True))
            words = (
                f"no-{key}" if value is False else key if value is True else f"{key}{value}"
                for key, value in chosen.items()
            )
            yield "-".join([name, *words]), {**rest, "settings": {**rest.get("settings", {}), **chosen}}


def _build(kind: Any, value: Any, at: str) -> Any:
    """Make a value of the annotated type; every refusal names the key."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, dict):
            raise S3Error(f"{at} is {value!r}: it must be a mapping")
        hints = get_type_hints(kind)
        required = [f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING]
        where = f"{at}: " if at else ""
        for key in value:
            if key not in hints:
                raise S3Error(f"{where}there is no setting {key!r}; there are {', '.join(hints)}")
        for key in required:
            if key not in value:
                raise S3Error(f"{where}{key} is missing")
        parts = {key: _build(hints[key], part, f"{at}.{key}".lstrip(".")) for key, part in value.items()}
        try:
            return kind(**parts)
        except S3Error as error:
            raise S3Error(f"{where}{error}") from None
    arguments, origin = get_args(kind), getattr(kind, "__origin__", None)
    if type(None) in arguments:
        return None if value is None else _build(arguments[0], value, at)
    if kind is Any:
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, origin or kind) or (kind is int and isinstance(value, bool)):
        raise S3Error(f"{at} is {value!r}: it must be a {(origin or kind).__name__}")
    if kind is float and not math.isfinite(value):
        raise S3Error(f"{at} is {value}: it must be finite")
    if origin is list:
        return [_build(arguments[0], part, f"{at}[{i}]") for i, part in enumerate(value)]
    if origin is dict:
        for key in value:
            if not isinstance(key, str):
                raise S3Error(f"{at} has the key {key!r}: it must be a text, in quotes")
        return {key: _build(arguments[1], part, f"{at}.{key}") for key, part in value.items()}
    return value


def _require(holds: bool, what: str, must: str) -> None:
    if not holds:
        raise S3Error(f"{what}: must be {must}")
