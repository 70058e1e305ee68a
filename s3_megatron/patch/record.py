"""``python -m s3_megatron.patch.record PATH``: the patch for a new release of a host (docs/new-host-version.md)."""

import json
import sys
from pathlib import Path
from typing import Any

from s3_megatron.errors import S3Error
from s3_megatron.patch import edit, symbols
from s3_megatron.patch.place import Place, find
from s3_megatron.patch.release import PATCHES, TouchedFile, file_hash, line_hash, load, nearest, read_hunks
from s3_megatron.patch.work import Change, as_diff


def make_patch(place: Place) -> str:
    """Put the lines of the nearest release's patch into the release in ``place``, and give them as a patch.

    Raises:
        S3Error: what stands before them in the nearest release is not in this one.
    """
    texts = []
    for file in load(place.host, nearest(place.host, place.version)).files:
        path = place.root / file.path
        old = path.read_bytes()
        texts.append(as_diff(place.root, Change(path, old, edit.insert(file, old))))
    return "".join(texts)


def make_record(place: Place, patch: str) -> dict[str, Any]:
    """Describe the release in ``place``, unpatched: the files that ``patch`` touches, and the symbols."""
    files = {}
    for path, hunks in read_hunks(patch).items():
        data = (place.root / path).read_bytes()
        lines = tuple(map(line_hash, data.splitlines()))
        before = file_hash(data)
        patched = file_hash(edit.insert(TouchedFile(path, before, "", lines, hunks), data))
        files[path] = {"before": before, "patched": patched, "lines": " ".join(lines)}
    return {"files": files, "symbols": symbols.describe(place)}


def main(path: str, host: str | None = None) -> None:
    """Write the patch of the release at ``path``, where there is none yet, and its record."""
    place = find(Path(path), host)
    patch = PATCHES / place.host / f"{place.version}.patch"
    text = patch.read_text(encoding="utf-8") if patch.exists() else make_patch(place)
    record = make_record(place, text)
    patch.write_text(text, encoding="utf-8")
    patch.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {patch} and {patch.stem}.json: {len(record['symbols'])} of {len(symbols.listed(place.host))} symbols")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except S3Error as error:
        sys.exit(f"error: {error}")
