"""Bytes and operations of one forward pass, and the time below which no program can go. Never imports torch.

A pass takes `max(bytes / bandwidth, operations / peak)` seconds. One multiply-add counts as two operations; norms,
activations and softmax are left out. Sources: S. Williams et al., "Roofline" (2009); the closed forms for attention
and experts are those of the models' own geometry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sparing.config.memory import CompressedSpec, MemorySpec, RecurrentSpec
from sparing.config.protocol import ModelConfig
from sparing.config.roles import layer_of
from sparing.planning.experts import expected_experts
from sparing.planning.hardware import Hardware
from sparing.planning.memory import bytes_read, memory_kind
from sparing.planning.parameters import count_parameters, element_size

__all__ = ["Pass", "attention_flops", "compressed_flops", "decode_pass", "denoise_pass", "prefill_pass", "weights_read"]


@dataclass(frozen=True)
class Pass:
    """What one forward pass over the whole batch reads and computes."""

    nbytes: float
    flops: float

    def seconds(self, machine: Hardware, weights: str = "stored") -> float:
        """The least time; products of fp8 weights run at the machine's fp8 rate, all others at its bf16 rate."""
        return max(self.nbytes / machine.bandwidth, self.flops / (machine.fp8 if weights == "fp8" else machine.bf16))


def decode_pass(
    config: ModelConfig, specs: Sequence[MemorySpec | None], *, context: int, batch: int, bits: Mapping[str, float]
) -> Pass:
    """One new token for each of `batch` sequences that remember `context` tokens.

    bits: per kind of parameter, from `bits_per_parameter`.
    """
    counts = count_parameters(config.tensors())
    flops = 2 * _multiplied(config, counts) + attention_flops(config, specs, context, new=1)
    kv = bytes_read(specs, context, element_size(config))
    return Pass(weights_read(config, batch, bits) + batch * kv, batch * flops)


def denoise_pass(
    config: ModelConfig, specs: Sequence[MemorySpec | None], *, context: int, batch: int, bits: Mapping[str, float]
) -> Pass:
    """One denoising pass over a canvas of each of `batch` sequences that remember `context` tokens.

    The embedding is read and multiplied twice: for the mean embedding of the previous prediction, and as the head.
    """
    counts = count_parameters(config.tensors())
    per_token = 2 * (_multiplied(config, counts) + counts["self_conditioning"] + counts["embedding"])
    canvas = config.canvas_length
    assert canvas is not None
    flops = canvas * per_token + attention_flops(config, specs, context, new=canvas)
    extra = (counts["self_conditioning"] * bits["self_conditioning"] + counts["embedding"] * bits["embedding"]) / 8
    kv = bytes_read(specs, context, element_size(config))
    return Pass(weights_read(config, batch * canvas, bits) + extra + batch * kv, batch * flops)


def prefill_pass(
    config: ModelConfig, specs: Sequence[MemorySpec | None], *, tokens: int, batch: int, bits: Mapping[str, float]
) -> Pass:
    """Reading prompts of `tokens` tokens; only the last position goes beyond the last layer that stores anything."""
    tensors = config.tensors()
    last = max(i for i, spec in enumerate(specs) if spec is not None and memory_kind(spec) != "shared")
    early = {name: tensor for name, tensor in tensors.items() if (layer_of(name) or 0) <= last}
    body, tail = count_parameters(early), count_parameters(tensors)
    per_token = _multiplied(config, body) - _head(config, body)
    flops = 2 * (tokens * per_token + _multiplied(config, tail) - per_token)
    for spec in specs[: last + 1]:
        if isinstance(spec, RecurrentSpec):
            flops += tokens * _recurrent_flops(spec)
        elif isinstance(spec, CompressedSpec):
            flops += _compressed_prompt_flops(spec, config.num_attention_heads, tokens)
        elif spec is not None:
            flops += 4 * config.num_attention_heads * spec.head_dim * _causal_pairs(tokens, spec.window)
    return Pass(weights_read(config, batch * tokens, bits), batch * flops)


def weights_read(config: ModelConfig, tokens: int, bits: Mapping[str, float]) -> float:
    """Bytes of weights that one causal pass over `tokens` tokens reads, each matrix once.

    Of the experts, those that tokens with uniform routing are expected to choose.
    """
    counts = count_parameters(config.tensors())
    read = {kind: float(counts[kind]) for kind in ("matrices", "vectors", "float32", "head")}
    if counts["experts"]:
        hit = expected_experts(config.num_experts, config.top_k_experts, tokens)
        read["experts"] = counts["experts"] * hit / config.num_experts
    read["embedding"] = counts["embedding"]
    if not config.tie_word_embeddings:
        read["embedding"] = min(tokens, config.vocab_size) * config.hidden_size
    read["lookup"] = sum(min(tokens, s[0]) * s[1] for s, role in config.tensors().values() if role.kind == "lookup")
    return sum(number * bits[kind] / 8 for kind, number in read.items())


def attention_flops(config: ModelConfig, specs: Sequence[MemorySpec | None], context: int, *, new: int) -> int:
    """Scores and mixing of `new` tokens that see each other and every entry held after `context` tokens.

    A recurrent layer updates and reads its state instead.
    """
    flops = 0
    for spec in specs:
        if isinstance(spec, RecurrentSpec):
            flops += new * _recurrent_flops(spec)
        elif isinstance(spec, CompressedSpec):
            core, indexer = compressed_flops(spec, config.num_attention_heads, context + new)
            flops += new * (core + indexer)
        elif spec is not None:
            own = spec if spec.shared_with is None else replace(spec, shared_with=None)
            seen = own.entries(context) + new
            flops += 4 * new * config.num_attention_heads * spec.head_dim * seen
    return flops


def _recurrent_flops(spec: RecurrentSpec) -> int:
    """Of one token, step by step: a multiply-add per number of the state to update it, and one to read it."""
    return 4 * spec.num_heads * spec.head_dim * spec.state_size


def compressed_flops(spec: CompressedSpec, heads: int, tokens: int) -> tuple[int, int]:
    """(scores and mixing over the entries that a query reads, the indexer's scores of all entries) of one token that
    comes last of `tokens`."""
    read = spec.window_entries(tokens) + spec.read_entries(tokens)
    indexer = 0 if spec.index is None else 2 * spec.index.num_heads * spec.index.head_dim * spec.entries(tokens)
    return _entry_flops(spec, heads) * read, indexer


def _compressed_prompt_flops(spec: CompressedSpec, heads: int, tokens: int) -> int:
    """Of a prompt: every token reads the window before it and entries of what came before."""
    flops = _entry_flops(spec, heads) * _causal_pairs(tokens, spec.window) if spec.window else 0
    if not spec.ratio:
        return flops
    complete = _complete_windows(tokens, spec.ratio)
    if spec.index is None:
        return flops + _entry_flops(spec, heads) * complete
    topk, full = spec.index.topk, spec.index.topk * spec.ratio  # from `full` tokens on, a query reads topk entries
    read = _complete_windows(min(tokens, full), spec.ratio) + topk * max(tokens - full, 0)
    return flops + _entry_flops(spec, heads) * read + 2 * spec.index.num_heads * spec.index.head_dim * complete


def _entry_flops(spec: CompressedSpec, heads: int) -> int:
    """Score and mixing of one entry, for all query heads."""
    return 2 * heads * (spec.head_dim + (spec.value_dim or spec.head_dim))


def _complete_windows(tokens: int, ratio: int) -> int:
    """Pairs of a token and a window of `ratio` tokens that it, or one before it, completes."""
    windows, rest = divmod(tokens, ratio)
    return ratio * windows * (windows - 1) // 2 + windows * (rest + 1)


def _multiplied(config: ModelConfig, counts: Mapping[str, int]) -> int:
    """Weights that one token is multiplied with, head included."""
    chosen = counts["experts"] // config.num_experts * config.top_k_experts if counts["experts"] else 0
    return counts["matrices"] + chosen + _head(config, counts)


def _head(config: ModelConfig, counts: Mapping[str, int]) -> int:
    return counts["embedding"] if config.tie_word_embeddings else counts["head"]


def _causal_pairs(tokens: int, window: int | None) -> int:
    """Pairs of a query and a key it sees among `tokens` tokens: each sees itself and at most `window - 1` before."""
    width = tokens if window is None else min(tokens, window)
    return tokens * width - width * (width - 1) // 2
