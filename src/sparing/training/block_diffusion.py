"""The block-diffusion loss: text is encoded causally once, and every block of the response denoised against it.

One stack runs in both modes, so one step trains two things: to predict the next token of clean text (whose keys and
values the canvases read), and to restore a canvas of which an unknown share of tokens was replaced at random.
Source: DiffusionGemma fine-tuning (google-deepmind/gemma `sft_model`, NeMo Automodel for all blocks at once).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sparing.decoding.canvas import uniform_corrupt
from sparing.kernels.masks import block_diffusion_training_mask, encoder_mask
from sparing.models.diffusion_gemma import DiffusionGemma
from sparing.training.cross_entropy import capped_cross_entropy

__all__ = ["Examples", "Losses", "block_diffusion_loss", "fill_response"]

Step = tuple[Tensor, Tensor]  # keys, values of a layer [B, kv_heads, T, head_dim]


def fill_response(prompt: Sequence[int], response: Sequence[int], block: int, eos: int) -> list[int]:
    """Clean sequence of an example: prompt, response, and end ids until the response is whole blocks.

    The fill is real content: it is attended and learned. An empty response is filled to one block.
    """
    fill = -len(response) % block if response else block
    return [*prompt, *response, *[eos] * fill]


@dataclass(frozen=True)
class Examples:
    """A batch of clean sequences whose responses start at the same place.

    ids: int64 [B, prefix + J * block], filled as by `fill_response`, then with anything; valid: bool [B, J], which
    blocks of a row belong to its example (the first ones).
    """

    ids: Tensor
    prefix: int
    valid: Tensor


@dataclass(frozen=True)
class Losses:
    """Mean cross-entropies in nats per token: of restoring canvases, and of predicting the next token."""

    diffusion: Tensor
    autoregressive: Tensor

    @property
    def total(self) -> Tensor:
        return self.diffusion + self.autoregressive

    @property
    def parts(self) -> dict[str, Tensor]:
        return {"diffusion": self.diffusion, "autoregressive": self.autoregressive}


class EncodePass:
    """Causal attention over whole rows; keeps each layer's keys and values for the canvases.

    hidden: [B * T, H], what enters the first layer that runs (None: embeddings of the ids).
    """

    hidden: Tensor | None = None

    def __init__(self, ids: Tensor, windows: Sequence[int | None]):
        self.rows, self.tokens = ids.shape
        self.ids = ids.flatten()
        self.positions = torch.arange(self.tokens).repeat(self.rows)
        self.lengths = torch.full_like(self.ids, self.tokens)
        self.masks = {w: None if w is None or w >= self.tokens else encoder_mask(self.tokens, w) for w in set(windows)}
        self.windows = windows
        self.stored: dict[int, Step] = {}

    def narrow(self) -> None:
        return None

    def attend(self, layer: int, q: Tensor, k: Tensor | None, v: Tensor | None, scale: float = 1.0) -> Tensor:
        assert k is not None and v is not None
        q, k, v = (_by_row(x, self.rows) for x in (q, k, v))
        self.stored[layer] = k, v
        mask = self.masks[self.windows[layer]]
        return _attention(q, k, v, mask, scale, causal=mask is None)


class CanvasPass:
    """All noisy blocks of each row at once, reading the encoded keys and values of what comes before each block.

    hidden: as in `EncodePass`.
    """

    hidden: Tensor | None = None

    def __init__(
        self, canvases: Tensor, prefix: int, block: int, windows: Sequence[int | None], stored: Mapping[int, Step]
    ):
        """canvases: int64 [B, J * block]; stored: per layer, of B rows."""
        self.rows, response = canvases.shape
        self.ids = canvases.flatten()
        self.positions = torch.arange(prefix, prefix + response).repeat(self.rows)
        self.lengths = torch.full_like(self.ids, prefix + response)
        # Nothing reads the last clean block: its columns are left out.
        self.encoded = prefix + response - block
        seen = [*range(self.encoded), *range(prefix + response, prefix + 2 * response)]
        self.masks = {w: block_diffusion_training_mask(prefix, response, block, w)[:, seen] for w in set(windows)}
        self.windows, self.stored = windows, stored

    def narrow(self) -> None:
        return None

    def attend(self, layer: int, q: Tensor, k: Tensor | None, v: Tensor | None, scale: float = 1.0) -> Tensor:
        assert k is not None and v is not None
        q, k, v = (_by_row(x, self.rows) for x in (q, k, v))
        prefix_k, prefix_v = (x[:, :, : self.encoded] for x in self.stored[layer])
        mask = self.masks[self.windows[layer]]
        k, v = torch.cat([prefix_k, k], 2), torch.cat([prefix_v, v], 2)
        return _attention(q, k, v, None if mask.all() else mask, scale)


def _by_row(x: Tensor, rows: int) -> Tensor:
    """[B * T, heads, d] -> [B, heads, T, d]"""
    return x.unflatten(0, (rows, -1)).transpose(1, 2)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool = False) -> Tensor:
    """q: [B, heads, T, d]; k, v: [B, kv_heads, S, d]; returns [B * T, heads, d]."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) if group > 1 else x for x in (k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    return mixed.transpose(1, 2).flatten(0, 1)


def block_diffusion_loss(
    model: DiffusionGemma, examples: Examples, generator: torch.Generator | None = None, draws: int = 1
) -> Losses:
    """Both losses of a batch, as a fine-tuning step of DiffusionGemma computes them.

    Every block of a response is a canvas with its own noise level t ~ U(0.0001, 0.9999) (the released recipe picks one
    block at random: the same expectation). Half of the canvases are denoised a first time without gradient, and their
    prediction is fed back; the loss is the plain mean over all positions, noisy or not. draws: independent noisings of
    each canvas, read from one encoding.
    """
    config, block, windows = model.config, model.config.canvas_length, [layer.window for layer in model.config.layers]
    ids, prefix = examples.ids, examples.prefix
    rows, blocks = examples.valid.shape
    encode = EncodePass(ids, windows)
    hidden = model(encode).unflatten(0, (rows, -1))  # [B, T, H]

    # A token is valid up to the end of its row's last valid block.
    length = prefix + examples.valid.sum(1) * block
    pairs = torch.arange(1, ids.shape[1]) < length[:, None]  # [B, T - 1]
    table, cap = model.output_table(), config.text.final_logit_softcapping
    autoregressive = capped_cross_entropy(hidden[:, :-1][pairs], table, ids[:, 1:][pairs], _mean(int(pairs.sum())), cap)

    target = ids[:, prefix:].repeat(draws, 1)  # [draws * B, J * block]
    rows *= draws
    t = torch.rand(rows * blocks, generator=generator) * (1 - 2e-4) + 1e-4
    noisy, _ = uniform_corrupt(target.reshape(rows * blocks, block), t, config.vocab_size, generator)
    noisy = noisy.view(rows, blocks * block)
    gate = torch.rand(rows, generator=generator) < 0.5  # whose first prediction is fed back
    stored = {i: (k.repeat(draws, 1, 1, 1), v.repeat(draws, 1, 1, 1)) for i, (k, v) in encode.stored.items()}
    soft = None
    if gate.any():
        with torch.no_grad():
            chosen = {i: (k[gate], v[gate]) for i, (k, v) in stored.items()}
            first = CanvasPass(noisy[gate], prefix, block, windows, chosen)
            logits = model.head(model.denoise_hidden(first, None))
        signal = model.soft_embedding(logits)  # the table it averages gets its gradient, the prediction none
        soft = signal.new_zeros(rows, blocks * block, signal.shape[-1]).index_put(
            (gate.nonzero()[:, 0],), signal.unflatten(0, (-1, blocks * block))
        )
        soft = soft.flatten(0, 1)
    hidden = model.denoise_hidden(CanvasPass(noisy, prefix, block, windows, stored), soft)
    kept = examples.valid.repeat(draws, 1).repeat_interleave(block, 1).flatten()
    diffusion = capped_cross_entropy(hidden[kept], table, target.flatten()[kept], _mean(int(kept.sum())), cap)
    return Losses(diffusion, autoregressive)


def _mean(count: int) -> Tensor:
    return torch.full((count,), 1.0 / count)
