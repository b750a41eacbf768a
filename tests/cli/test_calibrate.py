"""`sparing calibrate`, and what its file is for."""

import json
from typing import Any

import pytest
import torch

import sparing
from sparing.cli.conversation import Conversation
from sparing.memory.triattention.statistics import geometry, scored_layers
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
    few = command("calibrate", folders / "causal", "--text", text, "--out", tmp_path / "few", "--tokens", 64)
    assert sparing.Statistics.load(tmp_path / "few").tokens == 64, few.err

    flags = ["--kv", "triattention:200", "--statistics", out, "--max-new-tokens", 20]
    answer = command("generate", folders / "causal", "Once", *flags, "--json")
    assert answer.code == 0, answer.err
    done = [json.loads(line) for line in answer.out.splitlines()][-1]
    assert done["event"] == "done" and done["stats"]["evictions"] == []


def authors_file(path, layers=2, heads=2, bands=8, **metadata):
    """As the method's authors write it: a pickle of one dict of vectors for each layer and head."""
    vector = {"q_mean_real": torch.full((bands,), 0.6), "q_mean_imag": torch.full((bands,), -0.3)}
    stats = {
        f"layer{i:02d}_head{h:02d}": {**vector, "q_abs_mean": torch.full((bands,), 1.0 + i + h)}
        for i in range(layers)
        for h in range(heads)
    }
    torch.save({"metadata": {"rope_style": "half", **metadata}, "stats": stats}, path)
    return path


def test_from_the_authors_file(command, folders, tmp_path):
    """Ours say which model they fit; what they hold stays to the bit."""
    theirs, out = authors_file(tmp_path / "aime24.pt"), tmp_path / "queries.safetensors"
    result = command("calibrate", folders / "causal", "--from", theirs, "--out", out)
    assert result.code == 0, result.err
    assert result.out.startswith(f"{out}: 2 layers of 2 heads; queries of")
    found, model = sparing.Statistics.load(out), sparing.load(folders / "causal", device="cpu")
    assert found.digest == sparing.Statistics.load(theirs, allow_pickle=True).digest
    assert found.geometry == geometry(model.config) and found.weights is None
    inv_freq = found.layers[0].inv_freq
    assert inv_freq is not None and torch.equal(inv_freq, scored_layers(model.config)[0].rotation[0])
    flags = ["--kv", "triattention:200", "--statistics", out, "--max-new-tokens", 5]
    assert command("generate", folders / "causal", "Once", *flags).code == 0
    again = tmp_path / "again"
    assert command("calibrate", folders / "causal", "--from", out, "--out", again).code == 0
    assert sparing.Statistics.load(again).digest == found.digest


def test_a_file_that_does_not_fit_is_refused(refused, folders, text, tmp_path):
    out = tmp_path / "out"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"heads": 4}, "layer 0 have 4 heads of 8 bands, the model 2 of 8"),
        ({"bands": 4}, "2 heads of 4 bands"),
        ({"layers": 1}, "the statistics lack layer 1"),
        ({"layers": 3}, "the statistics have a layer 2, the model's layers are 0 to 1"),
        ({"rope_style": "interleaved"}, "rope_style is 'interleaved'"),
    ]
    for facts, message in cases:
        theirs = authors_file(tmp_path / "stats.pt", **facts)
        assert message in refused("calibrate", folders / "causal", "--from", theirs, "--out", out)
    theirs = authors_file(tmp_path / "stats.pt")
    assert "does not fit tales" in refused("calibrate", "tales", "--from", theirs, "--out", out)
    both = ("--from", theirs, "--text", text)
    assert "not both" in refused("calibrate", folders / "causal", *both, "--out", out)
    for extra in (("--length", 5), ("--add", theirs)):
        line = refused("calibrate", folders / "causal", "--from", theirs, "--out", out, *extra)
        assert "--length and --add go with --text" in line
    assert not out.exists()


def test_refusals(refused, folders, tmp_path):
    assert "give texts with --text, or statistics of others with --from" in refused(
        "calibrate", folders / "causal", "--out", tmp_path / "out"
    )
    (tmp_path / "latin").write_bytes(b"gr\xfcn")
    assert "latin: not UTF-8 text, byte 2" in refused(
        "calibrate", folders / "causal", "--text", tmp_path / "latin", "--out", tmp_path / "out"
    )
    assert "needs statistics=" in refused("generate", folders / "causal", "Once", "--kv", "triattention:64")
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
