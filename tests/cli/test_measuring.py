"""`sparing bench` and `sparing perplexity`, as people call them."""

import json
import math

import pytest

from tests.cli.models import TEXTS

FEW = ("--prompt-tokens", 8, "--new-tokens", 4, "--repetitions", 1)


def test_bench_measures_every_format_with_every_policy(command, folders):
    sides = ("--weights", "stored", "--weights", "int8", "--kv", "dense", "--kv", "turboquant:4")
    result = command("bench", folders / "causal", *FEW, *sides)
    assert result.code == 0, result.err
    lines = [line.split()[:2] for line in result.out.splitlines()[-4:]]
    assert lines == [[weights, kv] for weights in ("stored", "int8") for kv in ("dense", "turboquant:4")]
    found = json.loads(command("bench", folders / "causal", *FEW, *sides, "--json").out)
    assert [(side["weights"], [t["kv"] for t in side["timings"]]) for side in found] == [
        ("stored", ["dense", "turboquant:4"]),
        ("int8", ["dense", "turboquant:4"]),
    ]
    assert found[0]["weight_bytes"] > found[1]["weight_bytes"]
    assert all(t["new_tokens"] == 4 and t["decode_speed"] > 0 for side in found for t in side["timings"])


def test_perplexity_compares_policies_and_formats(command, folders, tmp_path):
    text = tmp_path / "text"
    text.write_text(" ".join(TEXTS) * 3)
    sides = ("--weights", "stored", "--weights", "int8", "--kv", "dense", "--kv", "turboquant:2,block=1")
    result = command("perplexity", folders / "causal", "--text", text, "--context", 32, "--tokens", 100, *sides)
    assert result.code == 0, result.err
    assert result.out.count("±") == 4 + 3
    options = ("--text", text, "--context", 32, "--tokens", 100, *sides, "--json")
    found = json.loads(command("perplexity", folders / "causal", *options).out)
    first, *others = found["predictions"]
    assert first["kl"] == 0 and all(other["kl"] > 0 for other in others)
    assert first["perplexity"] == pytest.approx(math.exp(first["nats"]))


def test_what_cannot_be_measured_is_one_line(refused, folders, tmp_path):
    empty, bytes_ = tmp_path / "empty", tmp_path / "bytes"
    empty.write_text("")
    bytes_.write_bytes(b"ok \xff")
    assert "the text has 0 tokens" in refused("perplexity", folders / "causal", "--text", empty)
    assert "not UTF-8 text, byte 3 is 0xff" in refused("perplexity", folders / "causal", "--text", bytes_)
    assert "do not fit the model's context" in refused("bench", folders / "causal", "--prompt-tokens", 10**6)
    assert "weights='int3' is not known" in refused("bench", folders / "causal", "--weights", "int3")
