"""What a quantisation has done so far, in `quantization.json`: the shards that are whole, and of what they were made.

The file is checked as a whole before anything in its folder is touched. A shard counts as done when its bytes are those
that were written, and the tensors it was made of those of the source at hand: the same checkpoint copied elsewhere goes
on, another of the same names and sizes does not.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparing.checkpoint.lock import LOCK
from sparing.checkpoint.write import LEFTOVER, file_at, remove_leftovers, write_json
from sparing.errors import CheckpointError

__all__ = ["REPORT", "Report", "Shard", "WeightError", "resumed"]

REPORT = "quantization.json"
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class WeightError:
    """What packing did to one weight. sqnr_db: signal to noise, None where nothing was lost; cosine: of the angle
    between the weight and what it became."""

    shape: tuple[int, ...]
    sqnr_db: float | None
    cosine: float


@dataclass(frozen=True)
class Shard:
    """A whole one. sha256: of its bytes; source: of the tensors that went into it."""

    sha256: str
    source: str


@dataclass
class Report:
    """settings: the format and its scales; shards: those that are whole; errors: of every matrix in them.

    plan: every shard's matrices, in whose order the report is written.
    """

    folder: Path
    plan: Mapping[str, Sequence[str]]
    settings: Mapping[str, Any]
    shards: dict[str, Shard]
    errors: dict[str, WeightError]

    def add(self, name: str, source: str, errors: Mapping[str, WeightError]) -> None:
        """A shard has taken its place. Raises CheckpointError where that cannot be written down."""
        shards = {**self.shards, name: Shard(_sha256(self.folder / name) or "", source)}
        whole = Report(self.folder, self.plan, self.settings, shards, {**self.errors, **errors})
        whole.save()
        self.shards, self.errors = whole.shards, whole.errors

    def save(self) -> None:
        done = [name for name in self.plan if name in self.shards]
        content = {
            "settings": self.settings,
            "shards": {name: asdict(self.shards[name]) for name in done},
            "errors": {matrix: asdict(self.errors[matrix]) for name in done for matrix in self.plan[name]},
        }
        write_json(self.folder / REPORT, content)


@contextmanager
def resumed(
    out: Path, settings: Mapping[str, Any], shards: Mapping[str, Sequence[str]], source: Callable[[str], str]
) -> Iterator[Report]:
    """The report of an interrupted run, or a new one; it is the first file written.

    shards: the packed matrices that each will hold; source: the digest of what a shard is made of.
    If the block fails, shards that the report does not know are removed, and the report where it knows of none.
    Raises CheckpointError, and changes nothing, for a folder of anything else, a report that is damaged, and shards of
    another source.
    """
    report = _read(out, settings, shards)
    for name in (*shards, "config.json"):
        file_at(out / name)
    for name, shard in report.shards.items():
        if shard.source != source(name):
            raise CheckpointError(
                f"{out}: holds a quantisation of another source, {name} was made of other weights; "
                "delete it or choose another folder"
            )
    for name in [name for name, shard in report.shards.items() if _sha256(out / name) != shard.sha256]:
        del report.shards[name]  # damaged since: it is written anew
        report.errors = {matrix: error for matrix, error in report.errors.items() if matrix not in shards[name]}
    remove_leftovers(out)
    try:
        if report.shards.keys() != shards.keys():
            (out / "config.json").unlink(missing_ok=True)  # the folder must not load before it is whole
        report.save()
        yield report
    except BaseException:
        for name in shards.keys() - report.shards.keys():
            (out / name).unlink(missing_ok=True)
        if not report.shards:
            (out / REPORT).unlink(missing_ok=True)
        raise


def _read(out: Path, settings: Mapping[str, Any], shards: Mapping[str, Sequence[str]]) -> Report:
    path = out / REPORT
    if not path.is_file():
        if inside := sorted(p.name for p in out.iterdir() if p.name != LOCK and not LEFTOVER.fullmatch(p.name)):
            raise CheckpointError(f"{out}: is not empty ({inside[0]}); choose another folder")
        return Report(out, shards, settings, {}, {})
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, f"not valid JSON: {error}") from error
    if not isinstance(value, dict) or value.keys() != {"settings", "shards", "errors"}:
        raise _damaged(path, "must have exactly settings, shards and errors")
    if value["settings"] != settings or not isinstance(value["shards"], dict) or value["shards"].keys() - shards.keys():
        raise CheckpointError(f"{out}: holds another quantisation; delete it or choose another folder")
    done = {name: _shard(path, name, shard) for name, shard in value["shards"].items()}
    if not isinstance(value["errors"], dict) or value["errors"].keys() != {m for name in done for m in shards[name]}:
        raise _damaged(path, "errors must name the matrices of its shards")
    return Report(out, shards, settings, done, {name: _error(path, name, e) for name, e in value["errors"].items()})


def _shard(path: Path, name: str, value: Any) -> Shard:
    digests = ("sha256", "source")
    if not isinstance(value, dict) or value.keys() != set(digests):
        raise _damaged(path, f"{name} must have exactly {' and '.join(digests)}")
    if not all(isinstance(value[key], str) and SHA256.fullmatch(value[key]) for key in digests):
        raise _damaged(path, f"{name} has digests that are no SHA-256")
    return Shard(**value)


def _error(path: Path, name: str, value: Any) -> WeightError:
    if not isinstance(value, dict) or value.keys() != {"shape", "sqnr_db", "cosine"}:
        raise _damaged(path, f"errors: {name} must have exactly shape, sqnr_db and cosine")
    shape, decibels, cosine = value["shape"], value["sqnr_db"], value["cosine"]
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(size) is int and size > 0 for size in shape):
        raise _damaged(path, f"errors: {name} has shape {shape!r:.60}")
    numbers = [cosine] if decibels is None else [cosine, decibels]
    if not all(type(number) in (int, float) and math.isfinite(number) for number in numbers) or abs(cosine) > 1:
        raise _damaged(path, f"errors: {name} has sqnr_db {decibels!r:.60}, cosine {cosine!r:.60}")
    return WeightError(tuple(shape), decibels, cosine)


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path}: {reason}; delete the folder or choose another")


def _sha256(path: Path) -> str | None:
    """Of a file's bytes, None where there is no file."""
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
