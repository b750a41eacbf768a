"""Quantised attention inside transformers' own models, by the definition in float64, against our memories."""

import math
from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from sparing.memory.turboquant.codebook import lloyd_max_codebook
from sparing.memory.turboquant.rotation import make_rotation, random_rotation
from tests.conformance.reference import load, save_random
from tests.tiny import SIZES, random_ids

CONFIG = SIZES | {"num_hidden_layers": 2, "head_dim": 16, "tie_word_embeddings": True}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny Llama whose parameters all have noise of deviation 0.2 added."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)

    def noisy(name: str, tensor: Tensor, noise: Tensor) -> Tensor:
        return tensor + 0.2 * noise

    theirs = save_random(LlamaForCausalLM, LlamaConfig(**CONFIG), folder, seed=3, scale=noisy)
    return theirs, load(folder)


@cache
def rotations(kind: str) -> tuple[list[Tensor], list[Tensor]]:
    """Of keys and of values, one a layer."""
    if kind == "rht":
        pair = [[make_rotation("rht", 16, 0, layer, role, 0).matrix for layer in range(2)] for role in (0, 1)]
    else:
        pair = [[random_rotation(16, 10 * layer + role).float() for layer in range(2)] for role in (0, 1)]
    return pair[0], pair[1]


def through_codes(x: Tensor, rotation: Tensor, bits: int, scale: str) -> Tensor:
    """Rotate, round, scale, rotate back: float64 [..., d], written out."""
    x, rotation, d = x.double(), rotation.double(), x.shape[-1]
    centroids, boundaries, _ = lloyd_max_codebook(d, bits)
    norm = x.norm(dim=-1, keepdim=True)
    u = x @ rotation.T / norm
    margin = (u[..., None] - boundaries).abs().min().item() * d**0.5
    assert margin > 1e-6, "a coordinate lies on a boundary, where float32 may round either way: take another seed"
    h = centroids[(u[..., None] >= boundaries).sum(-1)]
    factor = {
        "norm": norm,
        "renorm": norm / h.norm(dim=-1, keepdim=True),
        "lsq": norm * (u * h).sum(-1, keepdim=True) / (h * h).sum(-1, keepdim=True),
        "unbiased": norm / (u * h).sum(-1, keepdim=True),
    }[scale]
    return factor * (h @ rotation)


def quantised_attention(kind: str, bits: tuple[int, int], scale: str, window: int, block: int, sinks: int):
    def attend(module, query, key, value, attention_mask, scaling, **_):
        keys, values = rotations(kind)
        group = query.shape[1] // key.shape[1]
        exact = [x.double().repeat_interleave(group, 1) for x in (key, value)]
        coded_k = through_codes(key, keys[module.layer_idx], bits[0], scale).repeat_interleave(group, 1)
        coded_v = through_codes(value, values[module.layer_idx], bits[1], scale).repeat_interleave(group, 1)
        i, j = torch.arange(query.shape[2])[:, None], torch.arange(key.shape[2])
        is_exact = (j < sinks) | (i < (j // block + 1) * block + window)
        q = query.double()
        scores = torch.where(is_exact, q @ exact[0].transpose(-1, -2), q @ coded_k.transpose(-1, -2)) * scaling
        weights = scores.masked_fill(j > i, -math.inf).softmax(-1)
        mixed = (weights * is_exact) @ exact[1] + (weights * ~is_exact) @ coded_v
        return mixed.to(query.dtype).transpose(1, 2), None

    return attend


@torch.no_grad()
def reference_logits(theirs, tokens: Tensor, attend) -> Tensor:
    AttentionInterface.register("quantised", attend)
    before = theirs.config._attn_implementation
    theirs.config._attn_implementation = "quantised"
    try:
        return theirs(input_ids=tokens[None], use_cache=False).logits[0]
    finally:
        theirs.config._attn_implementation = before


@pytest.mark.parametrize(
    ("kind", "bits", "scale", "window", "block", "sinks"),
    [
        ("rht", (4, 4), "unbiased", 0, 1, 0),
        ("haar", (3, 2), "norm", 0, 1, 0),
        ("haar", (2, 4), "lsq", 3, 16, 2),
        ("rht", (8, 1), "renorm", 0, 16, 0),
    ],
)
def test_llama(llama, kind, bits, scale, window, block, sinks):
    theirs, ours = llama
    tokens = random_ids(50, seed=7)
    expected = reference_logits(theirs, tokens, quantised_attention(kind, bits, scale, window, block, sinks))
    options = {"scale": scale, "window": window, "block": block, "sink_tokens": sinks}
    rotation = "rht" if kind == "rht" else tuple(rotations(kind))
    for scale_dtype in ("float32", "float16"):
        for chunks in ([50], [20, 1, 29]):
            kv = f"turboquant:k{bits[0]}v{bits[1]}"
            memory = ours.memory(kv, rotation=rotation, scale_dtype=scale_dtype, **options)
            logits = torch.cat([ours.logits(chunk, memory) for chunk in tokens.split(chunks)])
            if scale_dtype == "float32":
                assert (logits - expected).abs().max() < 2e-4
            else:  # rounding a scale in one layer turns a code of the next: only the distributions stay close
                logs, theirs_logs = logits.log_softmax(-1), expected.log_softmax(-1)
                assert (theirs_logs.exp() * (theirs_logs - logs)).sum(-1).mean() < 1e-4
    assert (ours.logits(tokens) - expected).abs().max() > 2e-3  # the codes do matter


def test_the_key_bias_of_qwen2_costs_no_bits(tmp_path, monkeypatch):
    """A bias of norm 255 on the slowest pair: with it among the codes the model falls apart."""
    config = Qwen2Config(**CONFIG | {"head_dim": 12, "num_attention_heads": 4})
    torch.manual_seed(0)

    def loud_bias(name: str, tensor: Tensor, noise: Tensor) -> Tensor:
        if name.endswith("k_proj.bias"):
            bias = torch.zeros(2, 12)
            bias[:, [5, 11]] = 255 / 2**0.5
            return bias.flatten()
        return tensor + 0.2 * noise

    theirs = save_random(Qwen2ForCausalLM, config, tmp_path, seed=3, scale=loud_bias)
    ours = load(tmp_path)
    tokens = random_ids(60)
    with torch.no_grad():
        reference = theirs(input_ids=tokens[None], use_cache=False).logits[0].log_softmax(-1)

    def kl(**options) -> float:
        logs = ours.logits(tokens, ours.memory("turboquant:4", block=1, **options)).log_softmax(-1)
        return (reference.exp() * (reference - logs)).sum(-1).mean().item()

    known = kl()
    monkeypatch.setattr(type(ours), "key_biases", lambda self: [None] * 2)
    unknown = kl()
    assert unknown > 15 * known, (known, unknown)
