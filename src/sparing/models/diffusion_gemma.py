"""DiffusionGemma: one Gemma 4 stack, run causally to encode text and bidirectionally to denoise a canvas.

Encoding writes keys and values; denoising reads them, lets all canvas tokens see each other, and writes nothing. The
only weights of its own are a gated MLP that feeds the previous step's prediction back in.
Source: transformers `modeling_diffusion_gemma.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sparing import kernels
from sparing.config.diffusion_gemma import DiffusionGemmaConfig
from sparing.kernels import KeysFromValues
from sparing.kernels.vocabulary import VocabularyResult
from sparing.memory.group import Reading
from sparing.memory.sequence import Memory
from sparing.models.base import Batch, LanguageModel
from sparing.models.batch import RaggedBatch, Row
from sparing.models.gemma4 import Gemma4Stack, keys_from_values
from sparing.models.layers import Linear, RMSNorm

__all__ = ["DiffusionGemma"]


class SelfConditioning(nn.Module):
    """Adds what the previous step predicted to the embedding of the canvas."""

    def __init__(self, size: int, width: int, eps: float):
        super().__init__()
        self.pre_norm = RMSNorm(size, eps)
        self.gate_proj = Linear(size, width, bias=False)
        self.up_proj = Linear(size, width, bias=False)
        self.down_proj = Linear(width, size, bias=False)
        self.eps = eps

    def forward(self, embedded: Tensor, signal: Tensor | None) -> Tensor:
        """embedded, signal: [tokens, H]; None stands for a signal of zeros, whose MLP output is zero.

        The result has unit RMS in both cases.
        """
        if signal is not None:
            h = self.pre_norm(signal)
            embedded = embedded + self.down_proj(self.gate_proj(h, "gelu") * self.up_proj(h))
        return kernels.rms_norm(embedded, eps=self.eps)


class Denoiser(Gemma4Stack):
    """The stack with what only denoising needs. `layer_scalar` here is the denoiser's."""

    def __init__(self, config: DiffusionGemmaConfig):
        super().__init__(config.text)
        for layer in self.layers:
            layer.register_buffer("layer_scalar", torch.empty(1))
        width = config.text.layers[0].intermediate_size
        self.self_conditioning = SelfConditioning(config.text.hidden_size, width, config.text.rms_norm_eps)


class EncoderScalars(nn.Module):
    """The encoder's only tensors that are not the denoiser's: one scalar a layer."""

    def __init__(self, num_layers: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Module() for _ in range(num_layers))
        for layer in self.layers:
            layer.register_buffer("layer_scalar", torch.empty(1))


class DiffusionGemma(LanguageModel):
    """Encoder and denoiser over the same weights. Parameters carry their checkpoint names."""

    config: DiffusionGemmaConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, config: DiffusionGemmaConfig):
        super().__init__(config)
        self.model = nn.Module()
        self.model.decoder = Denoiser(config)
        self.model.encoder = nn.Module()
        self.model.encoder.language_model = EncoderScalars(config.text.num_hidden_layers)

    @property
    def stack(self) -> Denoiser:
        return self.model.decoder  # type: ignore[return-value]

    def forward(self, batch: Batch, trace: list[Tensor] | None = None) -> Tensor:
        """Encode: causal, with the encoder's layer scalars."""
        encoder: EncoderScalars = self.model.encoder.language_model  # type: ignore[assignment, union-attr]
        scalars = [layer.get_buffer("layer_scalar") for layer in encoder.layers]
        return self.stack(self.stack.embed(batch.ids), batch, scalars, trace)

    def denoise_hidden(self, batch: Batch, soft: Tensor | None, trace: list[Tensor] | None = None) -> Tensor:
        """Final-normed hidden states [tokens, H] of canvases.

        soft: [tokens, H] mean embedding row under the previous prediction (unscaled; a row of zeros: none), or None.
        """
        x = self.stack.embed(batch.ids)
        signal = None if soft is None else soft.to(x.dtype) * self.stack.embedding_scale()
        x = self.stack.self_conditioning(x, signal)
        return self.stack(x, batch, [layer.get_buffer("layer_scalar") for layer in self.stack.layers], trace)

    def output_table(self) -> Tensor:
        return self.stack.embed_tokens.weight

    def head(self, hidden: Tensor) -> Tensor:
        logits = kernels.linear(hidden, self.output_table()).float()
        cap = self.config.text.final_logit_softcapping
        return logits if cap is None else kernels.softcap(logits, cap)

    def soft_embedding(self, logits: Tensor) -> Tensor:
        """softmax(logits) @ embedding table: [L, V] -> [L, H] in the weights' dtype, unscaled."""
        probabilities = torch.softmax(logits.float(), -1).to(self.dtype)
        return kernels.weighted_rows(probabilities, self.output_table()).to(self.dtype)

    @torch.inference_mode()
    def denoise(
        self,
        canvas: Sequence[int] | Tensor,
        memory: Memory,
        soft: Tensor | None = None,
        reading: Reading | None = None,
    ) -> Tensor:
        """float32 logits [L, V] of every canvas position; the memory stays as it is.

        canvas: L ids; memory: the encoded text before it; soft: the previous step's tempered logits [L, V], or None;
        reading: what passes over one canvas share, see `Memory.reading`.
        Raises ValueError for ids out of range or a canvas beyond the model's context.
        """
        row = Row(self.check_tokens(canvas, memory, is_canvas=True), memory, causal=False, reading=reading)
        embedding = None if soft is None else self.soft_embedding(soft.to(self.device))
        return self.head(self._denoise_rows([row], embedding))

    @torch.inference_mode()
    def propose(
        self,
        canvases: Sequence[Tensor],
        memories: Sequence[Memory],
        soft: Sequence[Tensor | None],
        temperature: Tensor,
        noise: Callable[[int], Tensor] | None,
        bias: Tensor | None = None,
        readings: Sequence[Reading | None] | None = None,
    ) -> VocabularyResult:
        """One denoising pass over several canvases, reduced over the vocabulary without materialising logits.

        canvases: ids [L] each; soft: [L, H] of each one's previous pass, None in its first; temperature: [sum of L];
        noise: Gumbel noise source (None: the sample is the argmax); bias: [V], added to logits;
        readings: of each canvas. See `vocabulary_softmax` for the result.
        """
        with_each = zip(canvases, memories, readings or [None] * len(canvases), strict=True)
        rows = [Row(canvas, memory, causal=False, reading=reading) for canvas, memory, reading in with_each]
        return kernels.vocabulary_softmax(
            self._denoise_rows(rows, _stacked(canvases, soft)),
            self.output_table(),
            temperature=temperature,
            cap=self.config.text.final_logit_softcapping,
            noise=noise,
            embedding=self.output_table(),
            bias=bias,
        )

    def _denoise_rows(self, rows: Sequence[Row], soft: Tensor | None) -> Tensor:
        for row in rows:
            self.check_memory(row.memory)
        batch = RaggedBatch(rows)
        try:
            return self.denoise_hidden(batch, soft)
        finally:
            batch.rollback()

    def keys_from_values(self) -> list[KeysFromValues | None]:
        return keys_from_values(self.config.text, self.stack)


def _stacked(canvases: Sequence[Tensor], soft: Sequence[Tensor | None]) -> Tensor | None:
    """[sum of L, H]; rows of zeros are no signal, which is not what logits of zeros would be."""
    made = next((s for s in soft if s is not None), None)
    if made is None:
        return None
    rows = [made.new_zeros(len(c), made.shape[-1]) if s is None else s for c, s in zip(canvases, soft, strict=True)]
    return torch.cat(rows)
