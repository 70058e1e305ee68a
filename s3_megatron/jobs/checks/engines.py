"""What Megatron, DeepSpeed and the tokenizer themselves say of a job."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from s3_megatron.errors import S3Error
from s3_megatron.finding import ERROR, OK, WARNING, Finding, or_ok
from s3_megatron.jobs.check_args import MARK
from s3_megatron.jobs.flags import deepspeed_file, megatron_flags
from s3_megatron.jobs.job import Job
from s3_megatron.jobs.memory import deepspeed_json, zero_section
from s3_megatron.jobs.recipe import Data
from s3_megatron.optim import registry

# Seconds; a cold import of torch from a network disk takes a minute.
PATIENCE = 180


def deepspeed(job: Job, run: Path) -> Iterator[Finding]:
    """Check the layout and the JSON file of a job for DeepSpeed."""
    if job.recipe.engine == "deepspeed":
        found = f"ZeRO as in {job.recipe.deepspeed}, over {job.ranks} data-parallel ranks"
        yield from or_ok("deepspeed", found, [*_data_parallel_only(job), *_file(job)])


def _data_parallel_only(job: Job) -> Iterator[Finding]:
    layout = job.recipe.layout
    for key in ("tensor", "pipeline", "context"):
        if getattr(layout, key) > 1:
            yield Finding(
                ERROR,
                "deepspeed",
                f"layout.{key} {getattr(layout, key)}: the DeepSpeed entry shards over data-parallel ranks only",
                f"set layout.{key}=1 and let ZeRO shard (deepspeed=zero3 shards most), or engine=megatron",
            )


def _file(job: Job) -> Iterator[Finding]:
    try:
        config, zero = deepspeed_json(job), zero_section(job)
    except S3Error as error:
        yield Finding(ERROR, "deepspeed", str(error), "give a file of configs/deepspeed, or the path of one like them")
        return
    path, kind = deepspeed_file(job), config.get("optimizer", {}).get("type")
    if zero.get("stage", 0) == 0 and job.recipe.precision == "bf16":
        yield Finding(
            ERROR,
            "deepspeed",
            f"{path} has ZeRO stage 0, and precision is bf16: DeepSpeed cannot accumulate float32 gradients there",
            "deepspeed=zero1, or precision=fp32",
        )
    trained = registry.find(job.recipe.optimizer.name)
    if trained is not None and trained.beside and zero.get("stage", 0) not in (1, 2):
        yield Finding(
            ERROR,
            "deepspeed",
            f"{path} has ZeRO stage {zero.get('stage', 0)}, and {trained.title} runs in ZeRO 1 and 2 alone",
            "deepspeed=zero1 or zero2, or another optimizer",
        )
    if kind is None:
        return
    spec = registry.find(kind)
    name = {"adam": "adamw", "adamw": "adamw"}.get(str(kind).lower()) if spec is None else spec.name
    if name is None:
        titles = ", ".join(spec.title for spec in registry.specs())
        yield Finding(ERROR, "deepspeed", f"{path} has optimizer type {kind!r}", f"write {titles} or AdamW")
    elif name != job.recipe.optimizer.name:
        yield Finding(
            WARNING,
            "deepspeed",
            f"{path} has optimizer type {kind!r}, and the recipe trains with {job.recipe.optimizer.name}: the file's "
            "optimizer section does not count",
            "nothing, if that is meant; else change optimizer",
        )


def tokenizer(job: Job, run: Path) -> Iterator[Finding]:
    """Compare the tokenizer's vocabulary with the model's."""
    data = job.recipe.data
    if data.mock:
        yield Finding(OK, "tokenizer", "none: data.mock makes random tokens")
        return
    model = [] if data.tokenizer_model is None else [str(Path(job.cluster.data_dir) / data.tokenizer_model)]
    code = "import sys; from s3_megatron.data import load_tokenizer; print(load_tokenizer(*sys.argv[1:]).vocab_size)"
    # Offline: what is not here is not fetched, and an S3Error is the last line.
    done = _python(["-c", code, data.tokenizer, *model], {"HF_HUB_OFFLINE": "1"})
    last = _last_line(done.stdout)
    if done.returncode or not last.isdigit():
        why = _last_line(done.stderr).removeprefix("s3_megatron.errors.S3Error: ")
        yield Finding(WARNING, "tokenizer", f"not checked: {why}", "run the check where tokenizer and packages are")
        return
    size, wanted = int(last), job.recipe.model.vocab_size
    if size == wanted:
        yield Finding(OK, "tokenizer", f"{data.tokenizer} has {size} tokens, as model.vocab_size says")
    else:
        yield Finding(
            ERROR if size > wanted else WARNING,
            "tokenizer",
            f"{data.tokenizer} has {size} tokens, model.vocab_size is {wanted}",
            f"set model.vocab_size={size}, or use the tokenizer that the recipe means",
        )


def parser(job: Job, run: Path) -> Iterator[Finding]:
    """Have Megatron parse and validate the flags, and DeepSpeed its configuration, in a process of their own.

    Each stops at its first refusal. Data and tokenizer are left to their own checks: the flags for random tokens stand
    in, so that a missing file hides nothing.
    """
    engine = job.recipe.engine
    missing = [name for name in ("torch", "megatron.training", *["deepspeed"][engine == "megatron" :]) if _misses(name)]
    if missing:
        yield Finding(
            WARNING,
            "parser",
            f"not run: {', '.join(missing)} is not installed here",
            "run the check in the environment of the job, to have Megatron's own verdict",
        )
        return
    task = {
        "entry": engine,
        "argv": _arguments(job, run),
        "world_size": job.ranks,
        "rehearse": job.rehearsed,
    }
    # As the job's script sets it; what the cluster says instead is checked with the layout.
    settings = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "S3_REHEARSAL": "0", "PYTHONOPTIMIZE": ""}
    if job.rehearsed:
        settings["CUDA_VISIBLE_DEVICES"] = ""
    done = _python(["-m", "s3_megatron.jobs.check_args"], settings, json.dumps(task))
    answers = [line.removeprefix(MARK) for line in done.stdout.splitlines() if line.startswith(MARK)]
    if not answers:
        why = _last_line(done.stderr) or f"it ended with code {done.returncode}"
        yield Finding(WARNING, "parser", f"not run: {why}", "see whether s3-megatron doctor finds Megatron in order")
        return
    yield _verdict(json.loads(answers[-1]), "Megatron" if engine == "megatron" else "Megatron and DeepSpeed")


def _verdict(answer: dict[str, Any], who: str) -> Finding:
    notes = "".join(f"; {note}" for note in answer["left_out"])
    if answer["error"] is None:
        return Finding(OK, "parser", f"{who} accepted the flags{notes}")
    return Finding(ERROR, "parser", f"{answer['error']}{notes}", "mend the recipe; every flag: s3-megatron config show")


def _arguments(job: Job, run: Path) -> list[str]:
    recipe = job.recipe.model_copy(update={"data": Data(mock=True)})
    flags = [word for words in megatron_flags(Job(recipe, job.cluster), run) for word in words]
    if job.recipe.engine == "deepspeed":  # not in the run folder yet
        flags[flags.index("--deepspeed-config") + 1] = str(deepspeed_file(job))
    return flags


def _misses(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is None
    except ModuleNotFoundError:  # not even its parent
        return True


def _python(args: Sequence[str], settings: dict[str, str], text: str = "") -> subprocess.CompletedProcess[str]:
    command, env = [sys.executable, "-W", "ignore", *args], {**os.environ, **settings}
    try:
        return subprocess.run(
            command, env=env, input=text, capture_output=True, encoding="utf-8", errors="replace", timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"it takes more than {PATIENCE} s")


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
