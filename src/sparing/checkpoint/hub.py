"""Downloading a checkpoint from the Hugging Face hub, only the files a model needs, into the shared cache.

HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE mean what they mean to huggingface_hub, and the files lie where it
looks for them. It throws away a file that was interrupted, however; weights are therefore fetched here first, into a
partial file that the next attempt continues. What a server says becomes names on this disk: it is checked before.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparing.errors import CheckpointError

if TYPE_CHECKING:
    import torch

__all__ = ["CONFIGS", "TOKENIZER", "Headers", "download", "gguf_names", "read_headers"]

WEIGHTS = "*.safetensors"
CONFIGS = ("config.json", "generation_config.json")
TOKENIZER = ("*.json", "*.jinja", "merges.txt", "tokenizer.model")  # the last one only to say that it is there
NEEDED = (*TOKENIZER, WEIGHTS)
# folders hold other formats of the same weights (onnx/, original/); consolidated files are a second copy
SURPLUS = ["*/*.json", "*/*.safetensors", "consolidated*.safetensors"]
COMMIT = re.compile(r"[0-9a-f]{40}")
ETAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+=-]{0,199}")  # becomes the name of a file
SHA256 = re.compile(r"[0-9a-f]{64}")  # the ETag of a large file is its digest


def gguf_names(
    repo_id: str, tag: str | None = None, revision: str | None = None, *, cache_dir: Path | None = None
) -> list[str] | None:
    """The file of a GGUF model on the hub, or its pieces in order; None where the hub id holds other weights.

    tag: what the end of its name says, as `Q4_K_M`, where there are several.
    Raises CheckpointError listing the tags where none is given or none is found, and as `download`.
    """
    from huggingface_hub import HfApi, errors

    from sparing.checkpoint.gguf.split import whole_models

    with _explained(repo_id, revision):
        try:
            names = HfApi(endpoint=os.environ.get("HF_ENDPOINT")).list_repo_files(repo_id, revision=revision)
        except (errors.OfflineModeIsEnabled, errors.HTTPError, OSError) as error:  # pyright: ignore
            if isinstance(error, errors.RepositoryNotFoundError | errors.RevisionNotFoundError):
                raise
            names = _cached_names(repo_id, revision, cache_dir)
    models = whole_models([name for name in names if name.endswith(".gguf")])
    if not models or (tag is None and any(Path(name).match(WEIGHTS) for name in names)):
        if tag is not None:
            raise CheckpointError(f"{repo_id}: holds no GGUF model, of which {tag!r:.40} would be one; leave it out")
        return None
    fitting = [pieces for pieces in models if tag is None or _tag(pieces[0]).lower() == tag.lower()]
    if len(fitting) != 1:
        tags = ", ".join(sorted(f"{repo_id}:{_tag(pieces[0])}" for pieces in models))
        raise CheckpointError(f"{repo_id}: holds {len(models)} GGUF models, give one of them: {tags}")
    return fitting[0]


def _tag(name: str) -> str:
    """What the name of a model's file says of its quantisation, as `Q4_K_M`; all of it where it says nothing."""
    stem = re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", name.rpartition("/")[2])
    match = re.search(r"(?:^|[-._])((?:UD-)?(?:I?Q\d|TQ\d|MXFP\d|BF16|F16|F32)\w*)$", stem, re.IGNORECASE)
    return match[1] if match else stem


def _cached_names(repo_id: str, revision: str | None, cache_dir: Path | None) -> list[str]:
    """The files of a model that are in the cache."""
    from huggingface_hub import errors, snapshot_download

    try:
        where: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "local_files_only": True}
        folder = Path(snapshot_download(repo_id, allow_patterns=[], **where))
    except errors.LocalEntryNotFoundError:
        return []
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*.*")]


def download(
    repo_id: str,
    revision: str | None = None,
    *,
    files: Sequence[str] = NEEDED,
    cached: bool = False,
    cache_dir: Path | None = None,
) -> Path:
    """The local folder of a model on the hub, downloading what is missing.

    repo_id: `org/name`. revision: branch, tag or commit; None is `main`. files: patterns of what is wanted. cached:
    only what is here already.
    Raises CheckpointError for an unknown, private or gated model, an unknown revision, and where the network fails.
    """
    from huggingface_hub import errors, snapshot_download

    where: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "endpoint": os.environ.get("HF_ENDPOINT")}
    with _explained(repo_id, revision):
        if cached:
            try:
                folder = Path(snapshot_download(repo_id, allow_patterns=list(files), local_files_only=True, **where))
            except errors.LocalEntryNotFoundError:
                folder = Path()
            if not all((folder / name).exists() for name in files):
                raise CheckpointError(
                    f"{repo_id}: {files[0]} is not here, and a GGUF file says what it is only once it is: load it, or "
                    f"hf download {repo_id} {files[0]}"
                )
            return folder
        asked = _prepare(repo_id, list(files), where)
        folder = Path(snapshot_download(repo_id, allow_patterns=list(files), ignore_patterns=SURPLUS, **where))
        if not folder.is_dir():
            raise CheckpointError(f"{repo_id}: holds no file of a model ({', '.join(files)}); check the spelling")
        if WEIGHTS in files and not asked and not any(folder.glob(WEIGHTS)):
            raise errors.LocalEntryNotFoundError("only the description of the model is in the cache")
        return folder


@dataclass(frozen=True)
class Headers:
    """The names, shapes and types of tensors that lie on the hub (a TensorSource that cannot read)."""

    repo_id: str
    entries: Mapping[str, tuple[str, tuple[int, ...], str]]  # name -> type, shape, file

    def names(self) -> list[str]:
        return list(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entries[name][1]

    def dtype(self, name: str) -> str:
        return self.entries[name][0]

    def file(self, name: str) -> Path:
        return Path(self.entries[name][2])

    def is_mapped(self, name: str) -> bool:
        return False

    def read(self, name: str) -> "torch.Tensor":
        raise CheckpointError(f"{self.repo_id}: {name} was not downloaded; load the model to download its weights")

    def rows(self, name: str) -> "torch.Tensor":
        return self.read(name)

    def pieces(self, name: str) -> "Iterator[torch.Tensor]":
        yield self.read(name)

    def stored(self, name: str) -> Iterator[memoryview]:
        self.read(name)
        yield memoryview(b"")

    def release(self, name: str) -> None:
        pass


def read_headers(repo_id: str, revision: str | None = None) -> Headers:
    """What the weights of a model on the hub are called and shaped: the first bytes of each file, no weights.

    Raises CheckpointError as `download` does, and for a model without safetensors.
    """
    from huggingface_hub import HfApi, errors

    with _explained(repo_id, revision):
        try:
            found = HfApi(endpoint=os.environ.get("HF_ENDPOINT")).get_safetensors_metadata(repo_id, revision=revision)
        except (errors.NotASafetensorsRepoError, errors.SafetensorsParsingError) as error:
            raise CheckpointError(f"{repo_id}: its safetensors files are missing or damaged: {error}") from error
    entries = {
        name: (str(tensor.dtype), tuple(tensor.shape), file)
        for file, metadata in found.files_metadata.items()
        for name, tensor in metadata.tensors.items()
    }
    return Headers(repo_id, entries)


@contextmanager
def _explained(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turns what huggingface_hub and the network raise into a CheckpointError that says what to do."""
    from huggingface_hub import errors

    at, endpoint = f"{repo_id}@{revision}" if revision else repo_id, os.environ.get("HF_ENDPOINT")
    try:
        yield
    except CheckpointError:
        raise
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{at}: access is restricted; accept the licence on its page, then set HF_TOKEN to a token of that account"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{at}: no such model on the hub; check the spelling, or set HF_TOKEN if it is private"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{repo_id}: no revision {revision}; leave it out for the newest") from error
    except errors.HFValidationError as error:
        raise CheckpointError(f"{at}: not a valid hub id, which looks like org/name: {error}") from error
    except errors.LocalEntryNotFoundError as error:
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
            raise CheckpointError(
                f"{at}: not complete in the local cache, and HF_HUB_OFFLINE forbids downloading; unset it once"
            ) from error
        raise CheckpointError(
            f"{at}: the hub ({endpoint or 'default address'}) cannot be reached and the local cache is not complete; "
            "check the network, or give a folder"
        ) from error
    except (OSError, errors.HTTPError) as error:  # pyright: ignore[reportPrivateImportUsage]
        # a dropped connection, a proxy, a server in trouble, a full disk
        raise CheckpointError(
            f"{at}: download failed: {_reason(error)}; run the same command again to continue where it stopped"
        ) from error
    except Exception as error:  # what is raised where an answer is not of the form that the protocol has
        raise CheckpointError(
            f"{at}: what answers at {endpoint or 'the default address'} is not a hub ({_reason(error)}); "
            "look for a login page of this network in a browser, or a wrong HF_ENDPOINT"
        ) from error


def _reason(error: Exception) -> str:
    first = str(error).strip().splitlines()[:1]
    return ": ".join([type(error).__name__, *first])


def _prepare(repo_id: str, patterns: list[str], where: dict[str, Any]) -> bool:
    """Checks what the hub says about the files that are missing, and brings weights among them into the cache, each
    from the byte where an earlier attempt stopped.

    False where the hub cannot be asked: what is cached may be enough.
    """
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url, snapshot_download

    try:
        files = snapshot_download(repo_id, allow_patterns=patterns, ignore_patterns=SURPLUS, dry_run=True, **where)
    except errors.DryRunError:
        return False
    for file in files:
        if not COMMIT.fullmatch(file.commit_hash) or not _is_plain(file.filename):
            raise CheckpointError(
                f"{repo_id}: the hub names a file {file.filename!r:.100} of commit {file.commit_hash!r:.100}, "
                "which are no names of a hub; is HF_ENDPOINT right?"
            )
        if not file.will_download:
            continue
        url = hf_hub_url(repo_id, file.filename, revision=file.commit_hash, endpoint=where["endpoint"])
        stored = get_hf_file_metadata(url, endpoint=where["endpoint"])
        if stored.etag is not None and not ETAG.fullmatch(stored.etag):
            raise CheckpointError(
                f"{repo_id}: the hub gives {file.filename} the ETag {stored.etag!r:.100}, which is no name of a file; "
                "is HF_ENDPOINT right?"
            )
        if Path(file.filename).suffix not in (".safetensors", ".gguf") or stored.etag is None:
            continue  # small, or nothing to recognise a partial file by
        if stored.size is None and not SHA256.fullmatch(stored.etag):
            continue  # nor anything to tell whether it is whole
        if stored.xet_file_data is not None and find_spec("hf_xet") is not None:
            continue  # a protocol that keeps its own parts
        depth = len(Path(file.filename).parts)  # CACHE/models--org--name/snapshots/COMMIT/NAME, or FOLDER/NAME
        model = Path(file.local_path).parents[1 + depth]
        _fetch(url, file.filename, stored.size, model, stored.etag)
    return True


def _is_plain(name: str) -> bool:
    """Whether a name is that of a file, or of a GGUF file in a folder: quantisations may have one each."""
    parts = name.split("/")
    are_names = all(part not in ("", ".", "..") and Path(part).name == part and "\\" not in part for part in parts)
    return are_names and (len(parts) == 1 or (len(parts) == 2 and name.endswith(".gguf")))


def _fetch(url: str, name: str, size: int | None, model: Path, etag: str) -> None:
    """Bring one file into the cache of a model, under its ETag.

    Raises CheckpointError where the bytes that came are not those of the ETag; they are thrown away.
    """
    from huggingface_hub.utils import WeakFileLock

    blob, lock = model / "blobs" / etag, model.parent / ".locks" / model.name / f"{etag}.lock"
    blob.parent.mkdir(parents=True, exist_ok=True)
    lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists():
            return
        partial = blob.with_name(f"{etag}.partial")
        if partial.is_file() and not 0 < partial.stat().st_size <= (size or 0):
            partial.unlink()  # no half of it, or of a file whose size nobody knows
        is_resumed = partial.is_file()
        _receive(url, name, size, partial)
        if is_resumed and not _is_whole(partial, etag):
            partial.unlink()  # the half that lay here was of no use
            _receive(url, name, size, partial)
        if not _is_whole(partial, etag):
            partial.unlink()
            raise CheckpointError(
                f"{name}: what came is not what the hub announced (SHA-256 {etag}) and was deleted; "
                "run the same command again, or look for a proxy that changes downloads"
            )
        os.replace(partial, blob)


def _receive(url: str, name: str, size: int | None, partial: Path) -> None:
    """Download what is missing of a file. A connection that breaks leaves what has come, to go on from."""
    from huggingface_hub import errors
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    with open(partial, "ab") as stream:
        try:
            http_get(
                url,
                stream,
                resume_size=stream.tell(),
                headers=build_hf_headers(),
                expected_size=size,
                displayed_filename=name,
            )
        except OSError as error:
            # A whole answer of another size, such as the page of a network's login, is not the rest of the file.
            if error.errno is None and not isinstance(error, errors.HTTPError):  # pyright: ignore[reportPrivateImportUsage]
                stream.truncate(0)
            raise


def _is_whole(path: Path, etag: str) -> bool:
    """Whether a file is what its ETag says, as far as that says anything."""
    if not SHA256.fullmatch(etag):
        return True
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == etag
