"""Downloading a checkpoint from the Hugging Face hub, only the files a model needs, into the shared cache.

HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE mean what they mean to huggingface_hub. An interrupted download is
continued by the next one where it stopped.
"""

import os
from pathlib import Path

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
    try:
        return Path(
            snapshot_download(
                repo_id,
                revision=revision,
                cache_dir=cache_dir,
                endpoint=endpoint,
                allow_patterns=NEEDED,
                ignore_patterns=SURPLUS,
            )
        )
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
    except Exception as error:
        # Anything else is the transport's: a dropped connection, a proxy, a server error, a full disk.
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"{at}: download failed: {type(error).__name__}{': ' + reason[0] if reason else ''}; "
            "run the same command again to continue where it stopped"
        ) from error
