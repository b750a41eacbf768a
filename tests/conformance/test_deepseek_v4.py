"""DeepSeek-V4 against transformers, on tiny random models loaded from saved checkpoints.

The reference attends to all compressed entries under a mask and forgets its roll-back; what it computes is the same.
Rows of different lengths are compared one by one: the reference forms windows of padding too.
"""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from safetensors.torch import load_file
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM, DynamicCache

import sparing
from sparing.checkpoint import save_weights, write_json
from sparing.models.batch import Row
from tests.conformance.reference import assert_same, load, run_chunked, run_reference, save_random
from tests.tiny import COMPRESSED, CSA, HCA, SLIDING, compressed_scale, random_ids

CASES = {
    "every layer": {},
    "two streams": {"hc_mult": 2, "hc_sinkhorn_iters": 3},
    "four streams": {"hc_mult": 4},
    "sliding alone": {"layer_types": [SLIDING] * 5},
    "overlapping windows alone": {"layer_types": [CSA] * 5, "index_topk": 2, "sliding_window": 3},
    "windows alone": {"layer_types": [HCA] * 5, "compress_rates": {CSA: 4, HCA: 3}},
    "all entries chosen": {"index_topk": 100},
    "by score alone": {"mlp_layer_types": ["moe"] * 5, "swiglu_limit": 10.0},
    "by id alone": {"mlp_layer_types": ["hash_moe"] * 5},
    "plain rotation": {"rope_parameters": None},
    "one group of heads": {"o_groups": 1, "routed_scaling_factor": 2.5},
}
TOLERANCE = 4e-5  # of logits of about 5; the reference's own cached and uncached runs differ by half of it


@cache
def pair(case: str):
    """(the reference, our model loaded from its checkpoint)"""
    with TemporaryDirectory() as folder:
        config = DeepseekV4Config(**COMPRESSED | CASES[case])
        theirs = save_random(DeepseekV4ForCausalLM, config, Path(folder), seed=1, scale=compressed_scale)
        return theirs, load(Path(folder))


@pytest.mark.parametrize("case", CASES)
def test_hidden_states_and_logits(case):
    theirs, ours = pair(case)
    for length in (1, 3, 4, 8, 61):
        tokens = random_ids(length)
        reference = run_reference(theirs, tokens)
        hidden = ours.hidden_states(tokens)
        streams = [state for state in reference.hidden_states if state.ndim == 4]  # the last is the one that is normed
        assert len(hidden) >= len(streams)
        for mine, other in zip(hidden, streams, strict=False):
            assert_same(mine, other[0], TOLERANCE)
        with torch.no_grad():
            assert_same(ours.collapsed(hidden[-1]), reference.hidden_states[-1][0], TOLERANCE)
        assert_same(ours.logits(tokens), reference.logits[0], TOLERANCE)


@pytest.mark.parametrize("case", ["every layer", "overlapping windows alone", "windows alone"])
def test_every_way_to_cut_the_text(case):
    theirs, ours = pair(case)
    tokens = random_ids(41)
    reference = run_reference(theirs, tokens).logits[0]
    for chunks in ([1] * 41, [5, 1, 1, 7, 1, 26], [13, 9, 19], [8, 8, 25], *([cut, 41 - cut] for cut in (3, 4, 5, 7))):
        assert_same(run_chunked(ours, tokens, chunks), reference, TOLERANCE)


def test_entries_are_those_of_the_reference():
    theirs, ours = pair("every layer")
    cache, memory = DynamicCache(config=theirs.config), ours.memory()
    for chunk in random_ids(30).split([9, 1, 20]):
        with torch.no_grad():
            theirs(input_ids=chunk[None], past_key_values=cache)
        ours.logits(chunk, memory)
    for layer, kind in zip(cache.layers, ours.config.layers, strict=True):
        state = memory.layers[cache.layers.index(layer)].state()
        assert_same(state["window"][1:], layer.keys[0, 0], 1e-5)  # the reference holds one token less
        if kind.ratio:
            assert_same(state["compressed"], layer.compressed_kv["compressor"][0], 1e-5)
        if kind.kind == CSA:
            assert_same(state["keys"], layer.compressed_kv["indexer"][0], 1e-5)


def test_rows_of_a_batch_are_those_of_the_reference():
    theirs, ours = pair("every layer")
    rows = [random_ids(length, seed=length) for length in (1, 19, 8)]
    memories = [ours.memory() for _ in rows]
    for part in (slice(0, 1), slice(1, None)):  # the first token of each, then what follows
        given = [(tokens[part], memory) for tokens, memory in zip(rows, memories, strict=True) if len(tokens[part])]
        logits = ours.head(ours.run([Row(tokens, memory) for tokens, memory in given]))
        for (tokens, memory), mine in zip(given, logits.split([len(t) for t, _ in given]), strict=True):
            memory.commit(len(tokens))
            whole = next(row for row, of in zip(rows, memories, strict=True) if of is memory)
            assert_same(mine, run_reference(theirs, whole).logits[0, part], TOLERANCE)


def test_rejected_tokens_leave_no_trace():
    theirs, ours = pair("every layer")
    tokens = random_ids(40)
    reference = run_reference(theirs, tokens).logits[0]
    memory, at = ours.memory(), 0
    for kept, rejected in ((7, 5), (1, 9), (4, 0), (3, 1), (12, 13), (13, 2)):
        wrong = random_ids(rejected, seed=99 + at)
        logits = ours.head(ours.run([Row(torch.cat([tokens[at : at + kept], wrong]), memory)]))
        memory.commit(kept)
        assert_same(logits[:kept], reference[at : at + kept], TOLERANCE)
        at += kept
    assert at == 40


@pytest.mark.parametrize("dialect", ["transformers", "released"])
def test_both_dialects(dialect, tmp_path):
    """Names and config of the release, and those of transformers, give the same model."""
    _, ours = pair("every layer")
    config = dict(COMPRESSED)
    tensors = {name: tensor for name, tensor in ours.state_dict().items()}
    if dialect == "released":
        config |= {"compress_ratios": [0, 128, 4, 128, 4, 0], "num_hash_layers": 2, "qk_rope_head_dim": 8}
        config |= {"rope_scaling": {**config["rope_parameters"], "type": "yarn"}}
        for key in ("layer_types", "mlp_layer_types", "compress_rates", "rope_parameters", "partial_rotary_factor"):
            del config[key]
        pytest.skip("the release's ratios are 4 and 128")
    save_weights(tmp_path, tensors)
    write_json(tmp_path / "config.json", config)
    tokens = random_ids(20)
    assert torch.equal(sparing.load(tmp_path).logits(tokens), ours.logits(tokens))
