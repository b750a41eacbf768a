"""`sparing.calibrate`: the right queries, summed exactly, however the text is cut."""

from typing import Any

import pytest
import torch

import sparing
from sparing.inspection import calibration
from sparing.memory.triattention.scores import q_statistics
from tests.tiny import CONFIGS, model, random_ids


def equal(left: sparing.Statistics, right: sparing.Statistics, tolerance: float = 1e-5) -> None:
    assert left.layers.keys() == right.layers.keys() and left.tokens == right.tokens
    for i, layer in left.layers.items():
        torch.testing.assert_close(layer.center, right.layers[i].center, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(layer.norm, right.layers[i].norm, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["dense", "value-only", "shared", "shared value-only mixture", "hybrid"])
def test_queries_are_those_before_rotation(name, monkeypatch):
    """Without rotation the queries that attention sees are the same, and those are what is averaged."""
    ids = random_ids(80)
    found = sparing.calibrate(model(name), ids)
    seen: dict[int, torch.Tensor] = {}
    plain = calibration.RaggedBatch.attend

    def attend(self: Any, layer: int, q: torch.Tensor, *rest: Any) -> torch.Tensor:
        stack = model(name).backbone if name == "hybrid" else model(name).model
        module = stack.layers[layer]
        raw = (module.mixer if name == "hybrid" else module.self_attn).q_proj(states[layer])
        raw = raw.unflatten(-1, (-1, q.shape[-1]))
        norm = getattr(getattr(module, "self_attn", None), "q_norm", None)
        seen[layer] = raw if norm is None else norm(raw)
        return plain(self, layer, q, *rest)

    states: dict[int, torch.Tensor] = {}
    stack = model(name).backbone if name == "hybrid" else model(name).model
    hooks = [
        layer.get_submodule("norm" if name == "hybrid" else "input_layernorm").register_forward_hook(
            lambda _, __, out, i=i: states.update({i: out})
        )
        for i, layer in enumerate(stack.layers)
    ]
    monkeypatch.setattr(calibration.RaggedBatch, "attend", attend)
    model(name).hidden_states(ids)
    for hook in hooks:
        hook.remove()
    assert found.tokens == 80
    for i, layer in found.layers.items():
        r = 0 if layer.inv_freq is None else 2 * len(layer.inv_freq)
        center, norm = q_statistics(seen[i], r)
        torch.testing.assert_close(layer.center, center.to(torch.complex64), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.norm, norm.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["dense", "shared", "denoiser"])
def test_two_texts_are_the_sum_of_each(name):
    first, second = random_ids(48, 1), random_ids(88, 2)
    both = sparing.calibrate(model(name), [first.tolist(), second.tolist()])
    merged = sparing.calibrate(model(name), first).merge(sparing.calibrate(model(name), second))
    assert both.tokens == 136
    if name == "denoiser":  # each draws its own noise
        assert merged.tokens == 136
    else:
        equal(merged, both)
    with pytest.raises(ValueError, match="different models"):
        both.merge(sparing.calibrate(model("value-only"), first))


def test_chunks_do_not_matter_and_sequences_do(monkeypatch):
    ids = random_ids(100)
    whole = sparing.calibrate(model("dense"), ids)
    pieces = sparing.calibrate(model("dense"), list(ids.split(30)))
    equal(sparing.calibrate(model("dense"), ids, length=30), pieces)
    monkeypatch.setattr(calibration, "CHUNK", 7)
    done = []
    equal(sparing.calibrate(model("dense"), ids, progress=lambda *n: done.append(n)), whole)
    assert done[0] == (7, 100) and done[-1] == (100, 100) and len(done) == 15
    with pytest.raises(AssertionError):
        equal(whole, pieces)


def test_no_more_tokens_than_asked_for():
    """The same share of every text, from its beginning."""
    long, short = random_ids(90, 1), random_ids(30, 2)
    some = sparing.calibrate(model("dense"), [long, short], tokens=40)
    assert some.tokens == 40
    equal(some, sparing.calibrate(model("dense"), [long[:30], short[:10]]))
    equal(sparing.calibrate(model("dense"), long, tokens=90), sparing.calibrate(model("dense"), long))


def test_a_denoiser_is_calibrated_on_the_queries_of_its_canvases(monkeypatch):
    """One pass per noise level and canvas, whole canvases only, after the clean text before them."""
    passes = []
    denoise = type(model("denoiser")).denoise_hidden

    def counted(self, batch, soft, *rest):
        (row,) = batch.rows
        passes.append((row.memory.length, len(row.tokens), soft is None, row.causal))
        return denoise(self, batch, soft, *rest)

    monkeypatch.setattr(type(model("denoiser")), "denoise_hidden", counted)
    found = sparing.calibrate(model("denoiser"), random_ids(8 * 3 + 5))
    levels = len(calibration.NOISE)
    assert passes == [(8 * c, 8, i == 0, False) for c in range(3) for i in range(levels)]
    assert found.tokens == 24
    assert torch.equal(sparing.calibrate(model("denoiser"), random_ids(29)).layers[1].center, found.layers[1].center)
    with pytest.raises(ValueError, match="no text fills a canvas of 8 tokens"):
        sparing.calibrate(model("denoiser"), random_ids(7))


def test_a_rotation_that_is_not_the_configs(monkeypatch):
    from sparing.memory.triattention import statistics

    wrong = statistics.inverse_frequencies
    monkeypatch.setattr(statistics, "inverse_frequencies", lambda rope, d: (wrong(rope, d)[0] * 1.5, 1.0))
    with pytest.raises(ValueError, match="layer 0 rotates queries otherwise than its config says"):
        sparing.calibrate(model("dense"), random_ids(9))


def test_what_cannot_be_calibrated():
    with pytest.raises(ValueError, match="no tokens"):
        sparing.calibrate(model("dense"), [])
    with pytest.raises(ValueError, match="no tokenizer"):
        sparing.calibrate(model("dense"), "Once upon a time")
    with pytest.raises(ValueError, match="out of range"):
        sparing.calibrate(model("dense"), [1, 2, 999])
    with pytest.raises(ValueError, match="length is 0"):
        sparing.calibrate(model("dense"), random_ids(9), length=0)
    with pytest.raises(ValueError, match="tokens is 0"):
        sparing.calibrate(model("dense"), random_ids(9), tokens=0)
    for name in ("sliding", "recurrent"):
        with pytest.raises(ValueError, match="nothing to prune"):
            sparing.calibrate(model(name), random_ids(9))


@pytest.mark.parametrize("name", CONFIGS)
def test_calibrating_leaves_nothing_behind(name):
    if name in ("sliding", "recurrent", "compressed"):
        return
    ids = random_ids(40)
    before = model(name).logits(ids)
    sparing.calibrate(model(name), ids)
    assert torch.equal(model(name).logits(ids), before)
