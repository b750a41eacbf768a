"""Downloading a checkpoint from the Hugging Face hub, only the files a model needs, into the shared cache.

HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE mean what they mean to huggingface_hub, and the files lie where it
looks for them. It throws away a file that was interrupted, however; weights are therefore fetched here first, into a
partial file that the next attempt continues.
"""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sparing.errors import CheckpointError

__all__ = ["download"]

NEEDED = ["*.json", "*.safetensors", "*.jinja"]
# folders hold other formats of the same weights (onnx/, original/); consolidated files are a second copy
SURPLUS = ["*/*.json", "*/*.safetensors", "consolidated*.safetensors"]


def download(repo_id: str, revision: str | None = None, *, cache_dir: Path | None = None) -> Path:
    """The local folder of a model on the hub, downloading what is missing.

    repo_id: `org/name`. revision: branch, tag or commit; None is `main`.
    Raises CheckpointError for an unknown, private or gated model, an unknown revision, and where the network fails.
    """
    from huggingface_hub import errors, snapshot_download

    at = f"{repo_id}@{revision}" if revision else repo_id
    endpoint = os.environ.get("HF_ENDPOINT")
    where: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "endpoint": endpoint}
    try:
        _fetch_weights(repo_id, where)
        return Path(snapshot_download(repo_id, allow_patterns=NEEDED, ignore_patterns=SURPLUS, **where))
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


def _fetch_weights(repo_id: str, where: dict[str, Any]) -> None:
    """Brings the weights that are missing into the cache, each from the byte where an earlier attempt stopped."""
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url, snapshot_download
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    try:
        files = snapshot_download(
            repo_id, allow_patterns="*.safetensors", ignore_patterns=SURPLUS, dry_run=True, **where
        )
    except errors.DryRunError:
        return  # the hub cannot be asked: what is cached may be enough
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
