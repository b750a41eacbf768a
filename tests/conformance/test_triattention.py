"""Pruning beside transformers: the same queries, the same entries, the same logits when its cache is cut likewise.

transformers has no such memory. Its cache is gathered by hand between steps and its positions are stated; the full
recomputation hides, for each query, what had been forgotten before it.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import sparing
from sparing.memory.triattention.scores import bands, triattention_keep
from tests.conformance.reference import load, save_random
from tests.tiny import GEMMA, GEMMA3, KEYS_ARE_VALUES, SIZES, random_ids

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
SHAPE = SIZES | {"num_hidden_layers": 2, "head_dim": 12}
GEMMA4 = Gemma4TextConfig(
    **GEMMA
    | KEYS_ARE_VALUES
    | {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "hidden_size_per_layer_input": 4,
        "num_kv_shared_layers": 2,
    }
)
MODELS: dict[str, tuple[Any, Any]] = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 1e4})),
    "qwen3, yarn": (Qwen3ForCausalLM, Qwen3Config(**SHAPE, rope_parameters={**YARN, "attention_factor": 1.3})),
    "llama": (LlamaForCausalLM, LlamaConfig(**SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 1e4})),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig(
            **GEMMA3 | {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
        ),
    ),
    "gemma4, shared and K = V": (Gemma4ForCausalLM, GEMMA4),
}
PROMPT, LENGTH, BUDGET, INTERVAL = 6, 46, 16, 4


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory) -> tuple[Any, Any]:
    """(theirs, ours)"""
    folder = tmp_path_factory.mktemp("model")
    theirs = save_random(*MODELS[request.param], folder)
    return theirs, load(folder, "float32")


def attention_layers(theirs: Any) -> list[Any]:
    return [layer.self_attn for layer in theirs.model.layers]


@torch.no_grad()
def their_queries(theirs: Any, tokens: Tensor) -> dict[int, Tensor]:
    """What q_norm, or q_proj where there is none, puts out: [T, heads, d] per layer."""
    found: dict[int, Tensor] = {}
    hooks = []
    for i, attention in enumerate(attention_layers(theirs)):
        module = getattr(attention, "q_norm", attention.q_proj)

        def note(_module: Any, _inputs: Any, output: Tensor, i: int = i, d: int = attention.head_dim) -> None:
            output = (
                output if output.shape[1] == len(tokens) else output.transpose(1, 2)
            )  # Gemma 3: heads before tokens
            found[i] = output.reshape(len(tokens), -1, d)

        hooks.append(module.register_forward_hook(note))
    theirs(input_ids=tokens[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def test_statistics_are_those_of_their_queries(pair):
    theirs, ours = pair
    tokens = random_ids(200)
    found = sparing.calibrate(ours, tokens)
    queries = their_queries(theirs, tokens)
    assert found.layers
    for i, layer in found.layers.items():
        assert layer.inv_freq is not None
        z = torch.complex(*bands(queries[i].double(), 2 * len(layer.inv_freq)))
        torch.testing.assert_close(layer.center, z.mean(0).to(torch.complex64), rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(layer.norm, z.abs().mean(0).float(), rtol=1e-5, atol=2e-5)


@torch.no_grad()
def their_step(theirs: Any, cache: Any, token: Tensor, t0: int) -> Tensor:
    """One token over a cache of any length, at its true position."""
    held = max(layer.keys.shape[2] for layer in cache.layers if getattr(layer, "keys", None) is not None)
    mask: Any = torch.zeros(1, 1, 1, held + 1)
    if not isinstance(theirs, LlamaForCausalLM):
        window = getattr(theirs.config, "sliding_window", None) or 1
        mask = {"full_attention": mask, "sliding_attention": torch.zeros(1, 1, 1, min(t0, window - 1) + 1)}
    out = theirs(
        input_ids=token[None],
        attention_mask=mask,
        position_ids=torch.tensor([[t0]]),
        past_key_values=cache,
        use_cache=True,
    )
    return out.logits[0, -1]


@pytest.mark.parametrize("mode", ["global", "per_head", "per_layer_per_head"])
def test_a_cache_cut_likewise_gives_the_same_logits(pair, mode):
    theirs, ours = pair
    found = sparing.calibrate(ours, random_ids(200))
    owners = sorted(i for i in found.layers if ours.config.memory_specs()[i].shared_with is None)
    memory = ours.memory(f"triattention:{BUDGET}", statistics=found, interval=INTERVAL, mode=mode)
    cache = DynamicCache(config=theirs.config)
    tokens = random_ids(LENGTH, seed=2)
    mine = ours.logits(tokens[:PROMPT], memory)
    with torch.no_grad():
        out = theirs(input_ids=tokens[None, :PROMPT], past_key_values=cache, use_cache=True)
    torch.testing.assert_close(mine, out.logits[0], rtol=0, atol=1e-4)
    positions = {i: torch.arange(PROMPT).expand(len(memory.entries(i)), -1) for i in owners}
    for t0 in range(PROMPT, LENGTH):
        mine = ours.logits(tokens[t0 : t0 + 1], memory, prompt=False)
        expected = their_step(theirs, cache, tokens[t0 : t0 + 1], t0)
        torch.testing.assert_close(mine[0], expected, rtol=0, atol=1e-4)
        keys = [cache.layers[i].keys[0, :, PROMPT:] for i in owners]
        for i in owners:
            positions[i] = torch.cat([positions[i], torch.full((len(positions[i]), 1), t0)], 1)
        if memory.evictions and memory.evictions[-1]["length"] == t0 + 1:
            if len(found.layers) == len(owners):  # no consumers: their keys alone decide
                layers = [found.layers[i] for i in owners]
                chosen = triattention_keep(
                    keys,
                    [layer.center for layer in layers],
                    [layer.norm for layer in layers],
                    [layer.inv_freq for layer in layers if layer.inv_freq is not None],
                    t0 + 1,
                    BUDGET - PROMPT,
                    mode,
                    attention_scaling=[layer.scaling for layer in layers],
                )
                for n, i in enumerate(owners):
                    index = (chosen[n] if mode == "per_layer_per_head" else chosen) + PROMPT
                    kept = positions[i].gather(1, index.expand(len(positions[i]), -1))
                    assert torch.equal(memory.entries(i)[:, PROMPT:], kept)
            for i in owners:
                index = torch.searchsorted(positions[i].contiguous(), memory.entries(i).contiguous())
                layer = cache.layers[i]
                layer.keys, layer.values = (
                    x.gather(2, index[None, ..., None].expand(1, -1, -1, x.shape[-1]))
                    for x in (layer.keys, layer.values)
                )
                positions[i] = memory.entries(i)
    assert len(memory.evictions) >= 6


@torch.no_grad()
def test_recomputing_everything_with_a_mask_gives_the_same_logits(pair):
    """One forward over all tokens; what was forgotten before a query is hidden from it."""
    theirs, ours = pair
    found = sparing.calibrate(ours, random_ids(200))
    memory = ours.memory(f"triattention:{BUDGET}", statistics=found, interval=INTERVAL, mode="global")
    tokens, first = random_ids(LENGTH, seed=3), next(iter(found.layers))
    visible = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    rows = [ours.logits(tokens[:PROMPT], memory)]
    for t0 in range(PROMPT, LENGTH):
        visible[t0, :t0] = False
        visible[t0, memory.entries(first)[0]] = True
        rows.append(ours.logits(tokens[t0 : t0 + 1], memory, prompt=False))
    hidden = torch.zeros(LENGTH, LENGTH).masked_fill(~visible, torch.finfo(torch.float32).min)[None, None]
    mask: Any = hidden
    if not isinstance(theirs, LlamaForCausalLM):
        window = getattr(theirs.config, "sliding_window", None) or LENGTH
        seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().triu(1 - window)
        sliding = torch.zeros(LENGTH, LENGTH).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
        mask = {"full_attention": hidden, "sliding_attention": sliding}
    out = theirs(input_ids=tokens[None], attention_mask=mask, use_cache=False)
    torch.testing.assert_close(torch.cat(rows), out.logits[0], rtol=0, atol=1e-4)
    plain = theirs(input_ids=tokens[None], use_cache=False).logits[0]
    assert (plain - out.logits[0]).abs().max() > 0.05  # forgetting does change the output
