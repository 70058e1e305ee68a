"""What is in the data sets, against what the run reads of them."""

from collections.abc import Iterator
from pathlib import Path

from s3_megatron.data import caches, splits
from s3_megatron.data.writer import bin_and_idx
from s3_megatron.errors import S3Error
from s3_megatron.finding import ERROR, Finding, or_ok
from s3_megatron.jobs.job import Job
from s3_megatron.run_folder import RunFolder


def check(job: Job, run: Path) -> Iterator[Finding]:
    """Count documents and tokens of training and validation; files that are not here are left to their own check."""
    data, folder = job.recipe.data, Path(job.cluster.data_dir)
    if data.mock:
        return
    for index, (key, prefix) in enumerate((("data.train", data.train), ("data.validation", data.validation))):
        path = str(folder / str(prefix))
        if not all(file.is_file() for file in bin_and_idx(path)):
            continue
        request = _request(job, path, index)
        try:
            (part,) = splits.parts(request)
            sequences, tokens, _ = splits.tokens(part)
            lacks = [*splits.shortages(request), *caches.stale(request, RunFolder(run).cache, job.recipe.schedule.seed)]
        except S3Error as error:
            yield Finding(
                ERROR, f"{key} tokens", str(error), "prepare it again with 's3-megatron data prepare', or mend the path"
            )
            continue
        read = (part.samples or 0) * request.sequence / max(tokens, 1)
        found = f"{tokens:,} tokens in {sequences:,} documents; the run reads {read:.3g} times as many"
        yield from or_ok(f"{key} tokens", found, [Finding(ERROR, f"{key} tokens", *_halves(lack)) for lack in lacks])


def _request(job: Job, prefix: str, index: int) -> splits.Request:
    """What the entry asks of one of the two, and nothing of the other."""
    schedule = job.recipe.schedule
    batch = schedule.global_batch_size
    wanted = splits.samples(
        schedule.train_iters * batch, schedule.train_iters, batch, schedule.eval_iters, schedule.eval_interval
    )
    blends: list[splits.Blend | None] = [None] * len(splits.NAMES)
    blends[index] = [prefix], None
    sizes = [size if place == index else 0 for place, size in enumerate(wanted)]
    return splits.Request(sizes, job.recipe.model.seq_length, per_split=blends)


def _halves(line: str) -> tuple[str, str]:
    found, _, fix = line.partition(": ")
    return found, fix
