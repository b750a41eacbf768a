"""DiffusionGemma: one Gemma 4 stack, run causally to encode text and bidirectionally to denoise a canvas.

Encoding writes keys and values; denoising reads them, lets all canvas tokens see each other, and writes nothing. The
only weights of its own are a gated MLP that feeds the previous step's prediction back in.
Source: transformers `modeling_diffusion_gemma.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparing import kernels
from sparing.config.diffusion_gemma import DiffusionGemmaConfig
from sparing.kernels import KeysFromValues
from sparing.kernels.vocabulary import VocabularyResult
from sparing.memory.sequence import Memory
from sparing.models.base import Batch, LanguageModel
from sparing.models.batch import RaggedBatch, Row
from sparing.models.gemma4 import Gemma4Stack, keys_from_values
from sparing.models.layers import Linear, RMSNorm

__all__ = ["CanvasRow", "DiffusionGemma"]


@dataclass
class CanvasRow(Row):
    """A canvas: its tokens all see each other, and its memory keeps none of them.

    soft: [L, H] mean embedding row under the previous prediction, unscaled; None: there is none.
    """

    causal: bool = False
    soft: Tensor | None = None


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

    def forward(self, batch: Batch, trace: list[Tensor] | None = None, layers: range | None = None) -> Tensor:
        """Encode: causal, with the encoder's layer scalars."""
        x = self.stack.embed_tokens(batch.ids) if batch.hidden is None else batch.hidden
        return self.stack(x, batch, self._encoder_scalars(), trace, layers)

    def denoise_hidden(
        self, batch: Batch, soft: Tensor | None, trace: list[Tensor] | None = None, layers: range | None = None
    ) -> Tensor:
        """Hidden states [tokens, H] of canvases, as `forward` returns those of text.

        soft: [tokens, H] mean embedding row under the previous prediction (unscaled; a row of zeros: none), or None,
        also where the batch has hidden states: they are conditioned already.
        """
        x = self._conditioned(self.stack.embed_tokens(batch.ids), soft) if batch.hidden is None else batch.hidden
        return self.stack(x, batch, self._denoiser_scalars(), trace, layers)

    def mixed_hidden(self, batch: Batch, soft: Tensor | None, texts: int, layers: range | None = None) -> Tensor:
        """Hidden states of what is read of texts, then of canvases.

        texts: how many of the batch's tokens are text, which comes first; soft: as in `denoise_hidden`, of the rest.
        """
        if (x := batch.hidden) is None:
            x = self.stack.embed_tokens(batch.ids)
            x = torch.cat([x[:texts], self._conditioned(x[texts:], soft)])
        pairs = zip(self._encoder_scalars(), self._denoiser_scalars(), strict=True)
        return self.stack(x, batch, [torch.cat(pair) for pair in pairs], None, layers, texts)

    def _encoder_scalars(self) -> list[Tensor]:
        encoder: EncoderScalars = self.model.encoder.language_model  # type: ignore[assignment, union-attr]
        return [layer.get_buffer("layer_scalar") for layer in encoder.layers]

    def _denoiser_scalars(self) -> list[Tensor]:
        return [layer.get_buffer("layer_scalar") for layer in self.stack.layers]

    def _conditioned(self, embedded: Tensor, soft: Tensor | None) -> Tensor:
        """Embeddings of canvases with the previous prediction, [tokens, H]."""
        signal = None if soft is None else soft.to(embedded.dtype) * self.stack.embed_tokens.scale()
        return self.stack.self_conditioning(embedded, signal)

    def pass_over(self, batch: RaggedBatch, layers: range | None = None) -> Tensor:
        """Canvases (`CanvasRow`) follow texts, and share all products with them."""
        canvases = [row for row in batch.rows if isinstance(row, CanvasRow)]
        if not canvases:
            return self.forward(batch, layers=layers)
        texts, soft = len(batch.positions) - sum(row.size for row in canvases), _stacked(canvases)
        if soft is not None and batch.hidden is not None:
            raise ValueError("a canvas has hidden states and soft: give soft where it starts from its tokens")
        if texts:
            return self.mixed_hidden(batch, soft, texts, layers)
        return self.denoise_hidden(batch, soft, layers=layers)

    def output_table(self) -> Tensor:
        return self.stack.embed_tokens.weight

    def product(self, collapsed: Tensor) -> Tensor:
        logits = kernels.linear(collapsed, self.output_table()).float()
        cap = self.config.text.final_logit_softcapping
        return logits if cap is None else kernels.softcap(logits, cap)

    def soft_embedding(self, logits: Tensor) -> Tensor:
        """softmax(logits) @ embedding table: [L, V] -> [L, H] in the weights' dtype, unscaled."""
        probabilities = torch.softmax(logits.float(), -1).to(self.dtype)
        return kernels.weighted_rows(probabilities, self.output_table()).to(self.dtype)

    @torch.inference_mode()
    def denoise(self, canvas: Sequence[int] | Tensor, memory: Memory, soft: Tensor | None = None) -> Tensor:
        """float32 logits [L, V] of every canvas position; the memory stays as it is.

        canvas: L ids; memory: the encoded text before it; soft: the previous step's tempered logits [L, V], or None.
        Raises ValueError for ids out of range or a canvas beyond the model's context.
        """
        ids = self.check_tokens(canvas, memory, is_canvas=True)
        row = CanvasRow(ids, memory, soft=None if soft is None else self.soft_embedding(soft.to(self.device)))
        hidden = self.run([row])
        memory.rollback()
        return self.head(hidden)

    @torch.inference_mode()
    def predict(
        self,
        hidden: Tensor,
        temperature: Tensor,
        noise: Callable[[int], Tensor] | None = None,
        bias: Tensor | None = None,
    ) -> VocabularyResult:
        """What canvases become, reduced over the vocabulary without materialising logits.

        hidden: [L, H] of the pass; temperature: [L]; noise: Gumbel noise source (None: the sample is the argmax);
        bias: [V], added to logits. See `vocabulary_softmax` for the result.
        """
        return kernels.vocabulary_softmax(
            hidden,
            self.output_table(),
            temperature=temperature,
            cap=self.config.text.final_logit_softcapping,
            noise=noise,
            embedding=self.output_table(),
            bias=bias,
        )

    def keys_from_values(self) -> list[KeysFromValues | None]:
        return keys_from_values(self.config.text, self.stack)


def _stacked(canvases: Sequence[CanvasRow]) -> Tensor | None:
    """[sum of L, H]; rows of zeros are no signal, which is not what logits of zeros would be."""
    made = next((row.soft for row in canvases if row.soft is not None), None)
    if made is None:
        return None
    size = made.shape[-1]
    return torch.cat([made.new_zeros(row.size, size) if row.soft is None else row.soft for row in canvases])
