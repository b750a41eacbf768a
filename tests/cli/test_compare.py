"""`sparing compare`: outputs are those of `generate`, numbers are those of their definitions."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
import torch
from rich.console import Console

import sparing
from sparing.cli.compare import _show
from sparing.inspection.memories import compare_memories, kl_divergence
from tests.cli.models import TEXTS

PROMPT, TOKENS = "Once upon a time there was a king's daughter", 90
KV = ("dense", "turboquant:2", "triattention:60")


@pytest.fixture(scope="module")
def model(folders):
    return sparing.load(folders / "causal", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def statistics(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("statistics") / "queries"
    sparing.calibrate(model, " ".join(TEXTS) * 4).save(path)
    return path


@pytest.fixture(scope="module")
def found(model, statistics):
    policies = [(kv, {"statistics": statistics, "interval": 8, "block": 16}) for kv in KV]
    return compare_memories(model, PROMPT, policies, max_new_tokens=TOKENS, temperature=0.7, seed=4)


def options(kv: str, statistics: Any) -> dict[str, Any]:
    return {"statistics": statistics, "interval": 8} if "tri" in kv else {"block": 16} if "turbo" in kv else {}


def test_outputs_are_those_of_generate(model, statistics, found):
    for kv, result in zip(KV, found.results, strict=True):
        settings: dict[str, Any] = {"max_new_tokens": TOKENS, "temperature": 0.7, "seed": 4}
        events = list(sparing.generate(model, PROMPT, kv=kv, **settings, **options(kv, statistics)))
        commits = [event for event in events if isinstance(event, sparing.Commit)]
        done = events[-1]
        assert isinstance(done, sparing.Done)
        assert result.kv == kv
        assert result.ids == [token for commit in commits for token in commit.ids]
        assert result.text == "".join(commit.text for commit in commits)
        assert result.memory_bytes == done.stats["memory_bytes"]
        assert result.ratio == result.memory_bytes / found.results[0].memory_bytes
    assert found.results[0].same_tokens == len(found.results[0].ids) == TOKENS  # the model is random: no end is likely
    assert found.results[1].same_tokens < TOKENS
    assert [result.entries is None for result in found.results] == [True, True, False]
    assert found.results[2].entries in range(60, 68)


def test_divergence_is_that_of_the_first_text_fed_to_every_policy(model, statistics, found):
    prompt, text = model.tokenizer.encode(PROMPT), found.results[0].ids
    predictions = []
    for kv in KV:
        memory = model.memory(kv, **options(kv, statistics))
        rows = [model.logits(prompt, memory)[-1]]
        rows += [model.logits([token], memory)[0] for token in text[:-1]]
        predictions.append(torch.stack(rows).double().log_softmax(-1))
    for result, logs in zip(found.results, predictions, strict=True):
        expected = torch.nn.functional.kl_div(logs, predictions[0], log_target=True, reduction="batchmean")
        assert result.kl == pytest.approx(expected.item(), rel=1e-3, abs=1e-6)
    assert found.results[0].kl == 0
    assert min(result.kl for result in found.results[1:]) > 1e-3


def test_divergence_of_known_distributions():
    half, skewed = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    assert kl_divergence(half, half).item() == 0
    assert kl_divergence(half, skewed).item() == pytest.approx(0.5 * torch.tensor(4 / 3).log().item())


def test_side_by_side_where_there_is_room(model, found):
    wide, narrow = (
        Console(file=io.StringIO(), force_terminal=True, width=width, color_system="standard") for width in (120, 60)
    )
    for console in (wide, narrow):
        _show(found, model.tokenizer, console)
    shown = wide.file.getvalue()  # type: ignore[attr-defined]
    assert all(kv in shown.splitlines()[1] for kv in KV)
    assert "\x1b[1;33m" in shown  # what differs is bold yellow
    assert not any(all(kv in line for kv in KV) for line in narrow.file.getvalue().splitlines())  # type: ignore[attr-defined]
    same = Console(file=io.StringIO(), force_terminal=True, width=120, color_system="standard")
    alike = type(found)(1, 0, 0.0, (found.results[0], found.results[0]))
    _show(alike, model.tokenizer, same)
    assert "\x1b[1;33m" not in same.file.getvalue()  # type: ignore[attr-defined]


def test_one_after_another_in_a_pipe(command, folders, statistics):
    flags = [flag for kv in KV for flag in ("--kv", kv)]
    flags += ["--statistics", statistics, "--max-new-tokens", 30, "--temperature", 0.7, "--seed", 4]
    result = command("compare", folders / "causal", "Once upon", *flags)
    assert result.code == 0, result.err
    places = [result.out.index(f"[{kv}]\n") for kv in KV]
    assert places == sorted(places)
    assert not {c for c in result.out if ord(c) < 32 or 127 <= ord(c) < 160} - {"\n", "\t"}
    numbers = result.out.splitlines()[-5:]
    assert numbers[0].split("  ")[0] == "kv" and numbers[0].endswith("entries kept")
    assert [line.split()[0] for line in numbers[2:]] == [*KV]
    as_json = command("compare", folders / "causal", "Once upon", *flags, "--json")
    parsed = json.loads(as_json.out)
    assert [row["kv"] for row in parsed["results"]] == [*KV] and parsed["seed"] == 4
    assert len(parsed["results"][0]["ids"]) == 30 and parsed["results"][1]["kl"] >= 0


def test_a_mistake_gets_one_clear_line(refused, folders, statistics):
    causal = folders / "causal"
    assert "give --kv at least twice" in refused("compare", causal, "Once", "--kv", "dense")
    assert "Missing option '--kv'" in refused("compare", causal, "Once")
    assert "kv='codes' is not a memory policy" in refused(
        "compare", "nowhere", "Once", "--kv", "dense", "--kv", "codes"
    )
    two = ("compare", causal, "Once", "--kv", "dense", "--kv")
    assert "kv='triattention:60' needs statistics=" in refused(*two, "triattention:60")
    assert "which no --kv names" in refused(*two, "int8", "--statistics", statistics)
    assert "kv='triattention:2': the prompt has" in refused(*two, "triattention:2", "--statistics", statistics)
    other = refused("compare", "tales", "Once", "--kv", "dense", "--kv", "triattention:60", "--statistics", statistics)
    assert "kv='triattention:60': the statistics were made for a model of another config" in other
    assert "the prompt is empty" in refused("compare", causal, "", "--kv", "dense", "--kv", "int8")
