"""Policies on the command line: the options in their text do what arguments of `model.memory` do."""

from __future__ import annotations

import json

import pytest

import sparing
from tests.cli import models
from tests.tiny import HYBRID

SMALL = HYBRID | {
    "architectures": ["NemotronHForCausalLM"],
    "hybrid_override_pattern": "M*-",
    "max_position_embeddings": models.CONTEXT,
    "eos_token_id": None,
}
PROMPT = "Once upon a time there was a king's daughter"


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    tokenizer = models.text_tokenizer()
    folder = tmp_path_factory.mktemp("policies") / "hybrid"
    models.write(folder, SMALL | {"vocab_size": tokenizer.get_vocab_size()}, tokenizer, {})
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
    flags = ["--max-new-tokens", 9, "--temperature", 0, "--json", "--kv"]
    wide, narrow = (command("generate", hybrid, PROMPT, *flags, kv) for kv in ("dense", "dense,ssm_dtype=float16"))
    assert held(wide) - held(narrow) == 2 * SMALL["mamba_num_heads"] * SMALL["mamba_head_dim"] * SMALL["ssm_state_size"]
    model = sparing.load(hybrid)
    expected = list(sparing.generate(model, PROMPT, max_new_tokens=9, temperature=0, ssm_dtype="float16"))
    assert isinstance(expected[-1], sparing.Done)
    assert held(narrow) == expected[-1].stats["memory_bytes"]
    talking = ("chat", hybrid, "--max-new-tokens", 3, "--kv")
    assert command(*talking, "dense,ssm_dtype=float16", stdin="Hello\n").code == 0
    assert "use float32, bfloat16, float16" in command(*talking, "dense,ssm_dtype=float8", stdin="Hello\n").err
    assert "use float32, bfloat16, float16" in refused("generate", hybrid, PROMPT, *flags, "dense,ssm_dtype=float8")
    causal = ("generate", folders / "causal", PROMPT, *flags)
    assert "keeps a recurrent state" in refused(*causal, "dense,ssm_dtype=float16")
    assert "--statistics is for triattention, which --kv dense does not name" in refused(
        *causal, "dense", "--statistics", __file__
    )


def test_a_seed_is_the_samplers(command, hybrid):
    """Also under a policy whose rotation has one: that stands in the policy's text."""
    flags = ["--max-new-tokens", 9, "--temperature", 1, "--seed", 2, "--json", "--kv"]
    texts = [
        command("generate", hybrid, PROMPT, *flags, kv).out for kv in ("dense", "turboquant:8", "turboquant:8,seed=3")
    ]
    ids = [[e["ids"] for e in map(json.loads, text.splitlines()) if e["event"] == "commit"] for text in texts]
    assert ids[0] and ids[0] == ids[1] == ids[2]
    talking = ("chat", hybrid, *flags[:6], "--kv", "turboquant:8")
    said = [command(*talking, stdin="Hello\n").out for _ in range(2)]
    assert said[0] and said[0] == said[1]


def test_layers_without_rotation_are_pruned_where_it_is_said(command, refused, hybrid, statistics):
    flags = ["--statistics", statistics, "--temperature", 0]
    generating = ["generate", hybrid, PROMPT, *flags, "--max-new-tokens", 200, "--json", "--kv"]
    assert "use triattention:24,allow_nope=true" in refused(*generating, "triattention:24")
    with pytest.warns(UserWarning, match="attends in few layers"):
        result = command(*generating, "triattention:24,allow_nope=true")
    stats = json.loads(result.out.splitlines()[-1])["stats"]
    assert stats["evictions"]


def test_policies_that_are_compared_have_options_of_their_own(command, refused, hybrid, statistics):
    policies = ["dense,ssm_dtype=float16", "triattention:24,allow_nope=true", "turboquant:4,window=8"]
    flags = [flag for kv in policies for flag in ("--kv", kv)]
    with pytest.warns(UserWarning, match="attends in few layers"):
        result = command("compare", hybrid, PROMPT, *flags, "--statistics", statistics, "--max-new-tokens", 5, "--json")
    assert [found["kv"] for found in json.loads(result.out)["results"]] == policies
    two = ["--kv", "dense", "--kv", "window:9"]
    assert "--statistics is for triattention" in refused("compare", hybrid, PROMPT, *two, "--statistics", statistics)


def test_plan(command, hybrid):
    expected = sparing.plan(hybrid, context=50, ssm_dtype="bfloat16")
    result = command("plan", hybrid, "--context", 50, "--kv", "dense,ssm_dtype=bfloat16")
    assert result.out == expected.table() + "\n"
    assert "ssm_dtype=bfloat16" in result.out
    assert "allow_nope=true" in command("plan", hybrid, "--context", 50, "--kv", "triattention:24").out


@pytest.mark.parametrize(
    "kv",
    [
        "turboquant:4,window=16,sink_tokens=4",
        "triattention:64,mode=global,interval=8+turboquant:k8v4,block=16",
        "window:9",
        "int8,scale_dtype=float32",
    ],
)
def test_every_command_takes_the_same_policies(command, folders, tmp_path, kv):
    model, statistics = folders / "causal", []
    if "triattention" in kv:
        statistics = ["--statistics", tmp_path / "queries"]
        sparing.calibrate(sparing.load(model), " ".join(models.TEXTS) * 4).save(tmp_path / "queries")
    short = [*statistics, "--max-new-tokens", 2]
    for arguments in (
        ("plan", model, "--context", 99),
        ("inspect", model, "--context", 99),
        ("generate", model, PROMPT, *short),
        ("chat", model, *short),
        ("compare", model, PROMPT, "--kv", "dense", *short),
    ):
        result = command(*arguments, "--kv", kv, stdin="Once\n")
        assert result.code == 0, result
