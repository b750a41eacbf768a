"""`sparing.calibrate`: run texts through a model and take the statistics of its queries that TriAttention needs.

The queries are those a pruned memory will meet: after bias and norm, before rotation, of every layer that reads entries
which may be forgotten. A block-diffusion model reads its memory while it denoises, so its denoiser's queries count,
over falling noise.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sparing import kernels
from sparing.config.numbers import whole
from sparing.memory.triattention.layer_statistics import LayerStatistics
from sparing.memory.triattention.scores import q_statistics
from sparing.memory.triattention.statistics import ScoredLayer, Statistics, geometry, scored_layers
from sparing.models.base import LanguageModel
from sparing.models.batch import RaggedBatch, Row
from sparing.models.diffusion_gemma import DiffusionGemma

__all__ = ["calibrate"]

CHUNK = 1024  # tokens a pass
LONGEST = 32768  # tokens of one sequence
NOISE = (1.0, 0.75, 0.5, 0.25)  # shares of a canvas that are noise, one pass each
CHECKED = 997  # position at which rotation is compared with none

Progress = Callable[[int, int], None]
Note = Callable[[ScoredLayer, Tensor], None]


class ObservedBatch(RaggedBatch):
    """Rows whose queries are handed on, before rotation, as they are used. note: called with queries [T, heads, d]."""

    def __init__(self, rows: Sequence[Row], layers: Sequence[ScoredLayer], note: Note):
        super().__init__(rows)
        self._layers = {layer.layer: layer for layer in layers}
        self._note = note

    def attend(self, layer: int, q: Tensor, k: Tensor | None, v: Tensor | None, scale: float = 1.0) -> Tensor:
        if (scored := self._layers.get(layer)) is not None:
            self._note(scored, _unrotated(q, self.positions, scored))
        return super().attend(layer, q, k, v, scale)


def calibrate(
    model: LanguageModel,
    text_or_tokens: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Tensor,
    *,
    length: int | None = None,
    tokens: int | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """Query statistics of a model on its own reading of some text. 50,000 tokens of any coherent text are plenty.

    text_or_tokens: a text, token ids, or several of either. length: longest sequence that is read as one (None: 32768,
    or the model's context); longer texts are cut. tokens: about how many to read at most, the same share of each
    text from its beginning (None: all). progress: called with (tokens read, tokens in all).
    Raises ValueError for no tokens, a model whose memory cannot be pruned, and one whose rotation is not what its
    config says. Source: TriAttention section 3.3, with the queries that attention really uses.
    """
    length, tokens = (n if n is None else whole(name, n) for name, n in (("length", length), ("tokens", tokens)))
    layers = scored_layers(model.config)
    canvas: int | None = model.config.canvas_length
    context = model.config.max_position_embeddings
    longest = min(LONGEST if length is None else length, context)
    if longest < 1:
        raise ValueError(f"length is {length}: use at least 1")
    if tokens is not None and tokens < 1:
        raise ValueError(f"tokens is {tokens}: read at least 1")
    texts = _sequences(model, text_or_tokens)
    if tokens is not None and (given := sum(map(len, texts))) > tokens:
        texts = [ids[: math.ceil(len(ids) * tokens / given)] for ids in texts]
    sequences = [model.check_tokens(piece) for ids in texts for piece in ids.split(longest)]
    if canvas is not None:
        sequences = [s[: len(s) // canvas * canvas] for s in sequences if len(s) >= canvas]
    total = sum(map(len, sequences))
    if total == 0:
        raise ValueError("the text holds no tokens" if canvas is None else f"no text fills a canvas of {canvas} tokens")
    _check_rotation(model, layers, sequences[0][:1])

    centers = {layer.layer: torch.zeros(()) for layer in layers}
    norms, counts = dict(centers), dict.fromkeys(centers, 0)

    def note(layer: ScoredLayer, q: Tensor) -> None:
        center, norm = q_statistics(q, 2 * len(layer.rotation[0]))
        i = layer.layer
        centers[i], norms[i] = centers[i] + center * len(q), norms[i] + norm * len(q)  # sums in float64
        counts[i] += len(q)

    done, digest = 0, hashlib.sha256()
    for ids in sequences:
        digest.update(ids.cpu().numpy().tobytes())
        if isinstance(model, DiffusionGemma):
            passes = _denoise(model, ids, layers, note)
        else:
            passes = _read(model, ids, layers, note)
        for n in passes:
            done += n
            if progress is not None:
                progress(done, total)
    found = {}
    for layer in layers:
        i, (inv_freq, scaling) = layer.layer, layer.rotation
        center = (centers[i] / counts[i]).to(torch.complex64).cpu()
        if not (torch.view_as_real(center).isfinite().all() and norms[i].isfinite().all()):
            raise ValueError(f"the queries of layer {i} are not all finite: the model's weights may be damaged")
        found[i] = LayerStatistics(center, (norms[i] / counts[i]).float().cpu(), inv_freq, scaling)
    source = digest.hexdigest()[:16]
    return Statistics(found, done, geometry(model.config), model.query_weights(), source)


def _sequences(model: LanguageModel, given: object) -> list[Tensor]:
    """Token ids of each text."""
    if not isinstance(given, str | Sequence | Tensor):
        raise ValueError(f"the text is a {type(given).__name__}: give a text, token ids, or a list of either")
    if isinstance(given, str | Tensor) or (len(given) and isinstance(given[0], int)):
        given = [given]
    if any(isinstance(one, str) for one in given) and model.tokenizer is None:
        raise ValueError("the model has no tokenizer: give token ids")
    if bad := [one for one in given if not isinstance(one, str | Sequence | Tensor)]:
        raise ValueError(f"the text holds {bad[0]!r}: give a text, token ids, or a list of either")
    ids = [model.tokenizer.encode(one) if isinstance(one, str) and model.tokenizer else one for one in given]
    return [torch.as_tensor(one) for one in ids if len(one)]


@torch.inference_mode()
def _read(model: LanguageModel, ids: Tensor, layers: Sequence[ScoredLayer], note: Note) -> Iterator[int]:
    """Read a sequence; yields tokens done."""
    memory = model.memory()
    for chunk in ids.split(CHUNK):
        batch = ObservedBatch([Row(chunk, memory)], layers, note)
        model.forward(batch)
        batch.commit()
        yield len(chunk)


@torch.inference_mode()
def _denoise(model: DiffusionGemma, ids: Tensor, layers: Sequence[ScoredLayer], note: Note) -> Iterator[int]:
    """Denoise every canvas of a sequence after those before it, from pure noise to little; yields tokens done."""
    from sparing.decoding.canvas import uniform_corrupt

    memory, generator = model.memory(), torch.Generator().manual_seed(0)
    for clean in ids.split(model.config.canvas_length):
        soft = None  # embeddings under the prediction before, as a sampler feeds them back
        for level in NOISE:
            noisy, _ = uniform_corrupt(clean[None].cpu(), torch.tensor([level]), model.config.vocab_size, generator)
            batch = ObservedBatch([Row(noisy[0].to(ids.device), memory, causal=False)], layers, note)
            try:
                hidden = model.denoise_hidden(batch, soft)
            finally:
                batch.rollback()
            soft = kernels.vocabulary_softmax(
                hidden,
                model.output_table(),
                cap=model.config.final_logit_softcapping,
                embedding=model.output_table(),
            ).soft
        model.run([Row(clean, memory, wanted=0)])
        memory.commit(len(clean))
        yield len(clean)


def _unrotated(q: Tensor, positions: Tensor, layer: ScoredLayer) -> Tensor:
    """float32 queries before rotation. q: [T, heads, d] after it."""
    inv_freq, scaling = layer.rotation
    if len(inv_freq) == 0:
        return q.float()
    cos, sin = kernels.rope_tables(positions, inv_freq, torch.float32, 1 / scaling)
    return kernels.rotate(q.float(), cos, -sin)


@torch.inference_mode()
def _check_rotation(model: LanguageModel, layers: Sequence[ScoredLayer], token: Tensor) -> None:
    """A lone token sees only itself: its queries before rotation are the same wherever it stands, in every layer."""
    found: list[dict[int, Tensor]] = []
    for position in (0, CHECKED):
        queries: dict[int, Tensor] = {}
        batch = ObservedBatch([Row(token, model.memory())], layers, lambda s, q, to=queries: to.update({s.layer: q}))
        batch.positions = batch.positions + position
        model.forward(batch)
        found.append(queries)
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.05
    for i, here in found[0].items():
        difference = (found[1][i] - here).abs().max().item()
        if difference > tolerance * here.abs().max().item():
            raise ValueError(f"layer {i} rotates queries otherwise than its config says: statistics would be wrong")
