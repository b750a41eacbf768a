"""Options of memory policies on the command line: they reach the memory as arguments of `model.memory` do."""

from __future__ import annotations

import json

import pytest

import sparing
from tests.cli import models

HYBRID = {
    "model_type": "nemotron_h",
    "architectures": ["NemotronHForCausalLM"],
    "hybrid_override_pattern": "M*-",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 16,
    "conv_kernel": 4,
    "max_position_embeddings": models.CONTEXT,
    "eos_token_id": None,
}
PROMPT = "Once upon a time there was a king's daughter"


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    tokenizer = models.text_tokenizer()
    folder = tmp_path_factory.mktemp("policies") / "hybrid"
    models.write(folder, HYBRID | {"vocab_size": tokenizer.get_vocab_size()}, tokenizer, {})
    (folder / "chat_template.jinja").write_text(models.TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def statistics(hybrid, tmp_path_factory):
    path = tmp_path_factory.mktemp("statistics") / "queries.safetensors"
    sparing.calibrate(sparing.load(hybrid), " ".join(models.TEXTS)).save(path)
    return path


def held(result) -> int:
    """Bytes remembered in the end, of `generate --json`."""
    return json.loads(result.out.splitlines()[-1])["stats"]["memory_bytes"]


def test_states_in_16_bits(command, refused, hybrid, folders):
    flags = ["-m", hybrid, "--max-new-tokens", 9, "--temperature", 0, "--json"]
    wide, narrow = (command("generate", PROMPT, *flags, *more) for more in ([], ["--ssm-dtype", "float16"]))
    assert held(wide) - held(narrow) == 2 * 4 * 8 * 16
    model = sparing.load(hybrid)
    expected = list(sparing.generate(model, PROMPT, max_new_tokens=9, temperature=0, ssm_dtype="float16"))
    assert isinstance(expected[-1], sparing.Done)
    assert held(narrow) == expected[-1].stats["memory_bytes"]
    talking = ("chat", hybrid, "--max-new-tokens", 3, "--ssm-dtype")
    assert command(*talking, "float16", stdin="Hello\n").code == 0
    assert "use float32, bfloat16, float16" in command(*talking, "float8", stdin="Hello\n").err
    assert "use float32, bfloat16, float16" in refused("generate", PROMPT, *flags, "--ssm-dtype", "float8")
    assert "keeps a recurrent state" in refused("generate", PROMPT, "-m", folders / "causal", "--ssm-dtype", "float16")


def test_layers_without_rotation_are_pruned_where_it_is_said(command, refused, hybrid, statistics):
    flags = ["--kv", "triattention:24", "--statistics", statistics]
    generating = ["-m", hybrid, *flags, "--max-new-tokens", 200, "--temperature", 0, "--json"]
    assert "pass allow_nope=True" in refused("generate", PROMPT, *generating)
    with pytest.warns(UserWarning, match="attends in few layers"):
        result = command("generate", PROMPT, *generating, "--allow-nope")
    stats = json.loads(result.out.splitlines()[-1])["stats"]
    assert stats["evictions"]
    with pytest.warns(UserWarning, match="attends in few layers"):
        compared = command("compare", hybrid, PROMPT, "--kv", "dense", *flags, "--allow-nope", "--max-new-tokens", 5)
    assert compared.code == 0
    two = ["--kv", "dense", "--kv", "window:9"]
    assert "--allow-nope is for triattention" in refused("compare", hybrid, PROMPT, *two, "--allow-nope")
    states = command("compare", hybrid, PROMPT, *two, "--ssm-dtype", "float16", "--max-new-tokens", 5, "--json")
    assert states.code == 0


def test_plan(command, hybrid):
    expected = sparing.plan(hybrid, context=50, ssm_dtype="bfloat16")
    result = command("plan", hybrid, "--context", 50, "--ssm-dtype", "bfloat16")
    assert result.out == expected.table() + "\n"
    assert "ssm_dtype=bfloat16" in result.out
    assert "allow_nope=true" in command("plan", hybrid, "--context", 50, "--kv", "triattention:24").out
