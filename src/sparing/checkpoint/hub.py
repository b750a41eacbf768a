"""Downloading a checkpoint from the Hugging Face hub, only the files a model needs, into the shared cache.

HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE mean what they mean to huggingface_hub, and the files lie where it
looks for them. It throws away a file that was interrupted, however; weights are therefore fetched here first, into a
partial file that the next attempt continues.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparing.errors import CheckpointError

if TYPE_CHECKING:
    import torch

__all__ = ["CONFIGS", "TOKENIZER", "Headers", "download", "read_headers"]

WEIGHTS = "*.safetensors"
CONFIGS = ("config.json", "generation_config.json")
TOKENIZER = ("*.json", "*.jinja", "merges.txt", "tokenizer.model")  # the last one only to say that it is there
NEEDED = (*TOKENIZER, WEIGHTS)
# folders hold other formats of the same weights (onnx/, original/); consolidated files are a second copy
SURPLUS = ["*/*.json", "*/*.safetensors", "consolidated*.safetensors"]


def download(
    repo_id: str, revision: str | None = None, *, files: Sequence[str] = NEEDED, cache_dir: Path | None = None
) -> Path:
    """The local folder of a model on the hub, downloading what is missing.

    repo_id: `org/name`. revision: branch, tag or commit; None is `main`. files: patterns of what is wanted.
    Raises CheckpointError for an unknown, private or gated model, an unknown revision, and where the network fails.
    """
    from huggingface_hub import errors, snapshot_download

    where: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "endpoint": os.environ.get("HF_ENDPOINT")}
    with _explained(repo_id, revision):
        asked = WEIGHTS not in files or _fetch_weights(repo_id, where)
        folder = Path(snapshot_download(repo_id, allow_patterns=list(files), ignore_patterns=SURPLUS, **where))
        if not asked and not any(folder.glob(WEIGHTS)):
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
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"{at}: download failed: {type(error).__name__}{': ' + reason[0] if reason else ''}; "
            "run the same command again to continue where it stopped"
        ) from error


def _fetch_weights(repo_id: str, where: dict[str, Any]) -> bool:
    """Brings the weights that are missing into the cache, each from the byte where an earlier attempt stopped.

    False where the hub cannot be asked: what is cached may be enough.
    """
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url, snapshot_download
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    try:
        files = snapshot_download(repo_id, allow_patterns=WEIGHTS, ignore_patterns=SURPLUS, dry_run=True, **where)
    except errors.DryRunError:
        return False
    for file in files:
        if not file.will_download:
            continue
        url = hf_hub_url(repo_id, file.filename, revision=file.commit_hash, endpoint=where["endpoint"])
        stored = get_hf_file_metadata(url, endpoint=where["endpoint"])
        if stored.etag is None or stored.size is None:
            continue  # nothing to recognise a partial file by
        if stored.xet_file_data is not None and find_spec("hf_xet") is not None:
            continue  # a protocol that keeps its own parts
        model = Path(file.local_path).parents[2]  # CACHE/models--org--name/snapshots/COMMIT/NAME
        blob, lock = model / "blobs" / stored.etag, model.parent / ".locks" / model.name / f"{stored.etag}.lock"
        blob.parent.mkdir(parents=True, exist_ok=True)
        lock.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if blob.exists():
                continue
            partial = blob.with_name(f"{stored.etag}.partial")
            with open(partial, "ab") as stream:
                if stream.tell() > stored.size:
                    stream.truncate(0)
                http_get(
                    url,
                    stream,
                    resume_size=stream.tell(),
                    headers=build_hf_headers(),
                    expected_size=stored.size,
                    displayed_filename=file.filename,
                )
            os.replace(partial, blob)
    return True
