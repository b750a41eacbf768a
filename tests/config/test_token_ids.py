"""Special ids in a config: -1 says that there is none, as null does."""

import pytest

from sparing.config import parse_config
from sparing.config.released import RELEASED
from sparing.errors import CheckpointError

FAMILIES = ("llama-3.1-8b", "qwen3-8b", "nemotron-3-nano", "gemma-4-e2b")


def text_config(name: str) -> dict:
    return RELEASED[name].get("text_config", RELEASED[name])


@pytest.mark.parametrize("name", FAMILIES)
def test_minus_one_is_no_id(name):
    changed = parse_config(text_config(name) | {"pad_token_id": -1, "bos_token_id": -1, "eos_token_id": [-1]})
    assert (changed.pad_token_id, changed.bos_token_id, changed.eos_token_ids) == (None, None, ())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("key", ["pad_token_id", "eos_token_id"])
@pytest.mark.parametrize("value", [-2, 1.5, "2", [[1]]])
def test_what_is_no_id_is_refused(name, key, value):
    with pytest.raises(CheckpointError, match=key):
        parse_config(text_config(name) | {key: value})
