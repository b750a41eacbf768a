"""`sparing calibrate`, and what its file is for."""

import json

import pytest

import sparing
from sparing.cli.conversation import Conversation
from tests.cli.models import TEXTS


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(TEXTS) * 20, encoding="utf-8")
    return path


def test_from_text_to_pruned_answers(command, folders, text, tmp_path):
    out = tmp_path / "queries.safetensors"
    result = command("calibrate", folders / "causal", "--text", text, "--out", out)
    assert result.code == 0, result.err
    assert "tokens, " in result.out and "agree in direction" in result.out
    assert "tokens" in result.err  # progress, as lines where there is no terminal
    found = sparing.Statistics.load(out)
    assert found.tokens > 100
    more = command(
        "calibrate", folders / "causal", "--text", text, "--out", tmp_path / "more", "--add", out, "--length", 50
    )
    assert sparing.Statistics.load(tmp_path / "more").tokens == 2 * found.tokens, more.err

    flags = ["-m", folders / "causal", "--kv", "triattention:200", "--statistics", out, "--max-new-tokens", 20]
    answer = command("generate", "Once", *flags, "--json")
    assert answer.code == 0, answer.err
    done = [json.loads(line) for line in answer.out.splitlines()][-1]
    assert done["event"] == "done" and done["stats"]["evictions"] == []


def test_refusals(refused, folders, tmp_path):
    assert "Missing option '--text'" in refused("calibrate", folders / "causal", "--out", tmp_path / "out")
    (tmp_path / "latin").write_bytes(b"gr\xfcn")
    assert "latin: not UTF-8 text, byte 2" in refused(
        "calibrate", folders / "causal", "--text", tmp_path / "latin", "--out", tmp_path / "out"
    )
    assert "needs statistics=" in refused("generate", "Once", "-m", folders / "causal", "--kv", "triattention:64")
    assert not (tmp_path / "out").exists()


def test_a_conversation_forgets_by_its_statistics(folders, text):
    """Options of the memory reach it; a turn reports the rounds it had."""
    model = sparing.load(folders / "causal", dtype="float32", device="cpu")
    found = sparing.calibrate(model, text.read_text(encoding="utf-8"))
    options = {"statistics": found, "interval": 4, "protect_prompt": False, "max_new_tokens": 30, "temperature": 0}
    talk = Conversation(model, kv="triattention:20", **options)
    rounds = []
    for question in ("One?", "Two?", "Three?"):
        for event in talk.answer(question):
            if isinstance(event, sparing.Done):
                rounds.append(event.stats["evictions"])
    assert len(rounds) == 3 and any(rounds)
    with pytest.raises(ValueError, match=r"prompt has .* tokens and is protected, the budget is 20"):
        list(Conversation(model, kv="triattention:20", statistics=found).answer("A question of some length"))
