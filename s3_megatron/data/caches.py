"""Index caches that are older than their data: Megatron knows a cache by the data set's path, not by what is in it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from s3_megatron.data.index import read_index
from s3_megatron.data.splits import Part, Request, epochs, parts, tokens
from s3_megatron.data.writer import bin_and_idx


def stale(request: Request, folder: str | Path | None, seed: int) -> Iterator[str]:
    """Name each cache that a run would load, and that was built for other data under the same name.

    ``folder`` is --data-cache-path; None is Megatron's own place beside the data. A cache older than its data is read
    and compared with the data's lengths, so that data copied anew is no reason. Raises S3Error where a data set
    cannot be read.
    """
    for part in parts(request):
        index = bin_and_idx(part.prefix)[1]
        place = Path(part.prefix, "cache", "GPTDataset_indices") if folder is None else Path(folder)
        for description in place.glob(f"*-GPTDataset-{part.name}-description.txt"):
            base = str(description).removesuffix("description.txt")
            changed = index.stat()
            if not _describes(description, part, request, seed):
                continue
            # The second counts too: a copy that keeps its time, or a rename, changes only that.
            if max(changed.st_mtime, changed.st_ctime) >= description.stat().st_mtime and not _fits(
                base, part, request
            ):
                yield (
                    f"the index cache {base}*.npy was built for other data than {part.prefix} holds now, and training "
                    f"would leave documents out or end in their middle: delete it (rm '{base}'*), and it is built anew"
                )


def _describes(path: Path, part: Part, request: Request, seed: int) -> bool:
    try:
        written: Any = json.loads(path.read_text(encoding="utf-8"))
        wanted = (part.prefix, part.samples, part.name, request.sequence, seed)
        keys = ("dataset_path", "num_samples", "index_split", "sequence_length", "random_seed")
        return tuple(written.get(key) for key in keys) == wanted and written.get("split") == request.split
    except (OSError, ValueError, AttributeError):  # another program's, or gone meanwhile
        return False


def _fits(base: str, part: Part, request: Request) -> bool:
    """Whether sample i begins at token i x sequence of the documents in the cache's order, as the builder has it."""
    try:
        order = np.load(f"{base}document_index.npy", mmap_mode="r")
        starts = np.load(f"{base}sample_index.npy", mmap_mode="r")
    except FileNotFoundError:  # Megatron builds all anew
        return True
    except (OSError, ValueError, EOFError):
        return False
    documents, count, all_documents = tokens(part)
    first = round(part.bounds[0] * float(all_documents))
    if len(order) != documents * epochs(request, part, count) or starts[-1, 0] >= len(order):
        return False
    if order.min() < first or order.max() >= first + documents:
        return False
    begins = np.concatenate([[0], np.cumsum(read_index(part.prefix).lengths[order], dtype=np.int64)])
    at = begins[starts[:, 0]] + starts[:, 1]
    return bool((at[:-1] == np.arange(len(at) - 1) * request.sequence).all())
