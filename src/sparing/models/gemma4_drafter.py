"""Drafters of Gemma 4: four layers that attend to the target's keys and values and keep none of their own.

All drafts of a round are made from the same position and the same entries; what tells them apart is the newest token
and the hidden state that one draft hands to the next.
Source: transformers `modeling_gemma4_assistant.py` (whose class cannot be built, and which hands over entries of
rejected tokens).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sparing import kernels
from sparing.config.gemma4 import Gemma4Config
from sparing.config.gemma4_drafter import Gemma4DrafterConfig
from sparing.memory.group import Share
from sparing.memory.plan import MemoryPlan
from sparing.memory.sequence import Memory
from sparing.models.base import LanguageModel
from sparing.models.batch import RaggedBatch, Row
from sparing.models.gemma4 import Gemma4Stack
from sparing.models.layers import Linear

__all__ = ["Gemma4Drafter", "clustered_logits"]


class TargetBatch(RaggedBatch):
    """One token a row, at the position after what the target's memory holds, reading those entries.

    sources: per layer of the drafter, the target's layer that it reads; windows: entries it sees there, the last ones.
    """

    def __init__(
        self, tokens: Tensor, memories: Sequence[Memory], sources: Sequence[int], windows: Sequence[int | None]
    ):
        self.sources, self.windows = sources, dict(zip(sources, windows, strict=True))
        super().__init__([Row(token, memory) for token, memory in zip(tokens.split(1), memories, strict=True)])

    def _stage(self) -> None:
        pass  # it adds no entries

    def share(self, i: int, layer: int) -> Share:
        return Share(0, 1, True, self.rows[i].memory.length, self.windows[layer])

    def attend(self, layer: int, q: Tensor, k: Tensor | None, v: Tensor | None, scale: float = 1.0) -> Tensor:
        return super().attend(self.sources[layer], q, None, None, scale)


def clustered_logits(x: Tensor, table: Tensor, centroids: Tensor, ordering: Tensor, k: int) -> Tensor:
    """Logits of the tokens in the k clusters whose centroids fit best; all others get the least of them minus 1.

    x: [rows, D]; table: [V, D] output head; centroids: [C, D]; ordering: int64 [V], the ids cluster by cluster.
    Returns float32 [rows, V] from C + k V / C products a row instead of V. The reference takes the least over the
    batch; here a row does not depend on its neighbours.
    Source: Gemma 4 drafters, `use_ordered_embeddings`.
    """
    clusters = kernels.linear(x, centroids).topk(k).indices
    ids = ordering.view(len(centroids), -1)[clusters].flatten(1)  # [rows, k V / C]
    wide = kernels.arithmetic_dtype(x)
    scores = (table[ids].to(wide) @ x.to(wide)[..., None])[..., 0].to(x.dtype).float()
    rest = scores.amin(-1, keepdim=True) - 1.0
    return rest.repeat(1, len(table)).scatter(-1, ids, scores)


class Clusters(nn.Module):
    """What the clustered head knows besides the embedding table."""

    def __init__(self, config: Gemma4DrafterConfig):
        super().__init__()
        self.centroids = Linear(config.hidden_size, config.num_centroids, bias=False)
        self.register_buffer("token_ordering", torch.empty(config.vocab_size, dtype=torch.int64))


class Gemma4Drafter(LanguageModel):
    """A drafter for one of the five sizes. Parameters carry their checkpoint names."""

    config: Gemma4DrafterConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, config: Gemma4DrafterConfig):
        super().__init__(config)
        self.model = Gemma4Stack(config.text)
        for layer in self.model.layers:
            layer.register_buffer("layer_scalar", torch.empty(1))
        self.pre_projection = Linear(2 * config.backbone_hidden_size, config.hidden_size, bias=False)
        self.post_projection = Linear(config.hidden_size, config.backbone_hidden_size, bias=False)
        self.masked_embedding = Clusters(config) if config.num_centroids else None

    def sources(self, target: Gemma4Config) -> list[int]:
        """The target's layer that each layer reads: its last one of the same kind that makes keys and values.

        Raises ValueError where the two do not belong together.
        """
        config = self.config
        for name, ours, theirs in (
            ("backbone_hidden_size", config.backbone_hidden_size, target.hidden_size),
            ("vocab_size", config.vocab_size, target.vocab_size),
        ):
            if ours != theirs:
                raise ValueError(
                    f"the drafter's {name} is {ours}, the model's is {theirs}: use the model's own drafter"
                )
        sources = []
        for i, layer in enumerate(config.layers):
            source = target.last_producers.get(layer.kind)
            if source is None:
                raise ValueError(f"layer {i} of the drafter is {layer.kind}, the model has no such layer")
            shape, found = ((one.num_key_value_heads, one.head_dim) for one in (layer, target.layers[source]))
            if shape != found:
                raise ValueError(
                    f"layer {i} of the drafter reads {shape[0]} kv heads of {shape[1]}, the model's layer {source} has"
                    f" {found[0]} of {found[1]}: use the model's own drafter"
                )
            sources.append(source)
        if self.masked_embedding is not None:
            ordering = self.masked_embedding.get_buffer("token_ordering")
            if int(ordering.min()) < 0 or int(ordering.max()) >= config.vocab_size:
                raise ValueError("the drafter's masked_embedding.token_ordering names ids outside of its vocabulary")
        return sources

    @property
    def windows(self) -> list[int | None]:
        """Entries of the target that each layer sees: as far back as the window, and the newest."""
        return [None if layer.window is None else layer.window + 1 for layer in self.config.layers]

    @torch.inference_mode()
    def draft(
        self, tokens: Tensor, embedded: Tensor, hidden: Tensor, memories: Sequence[Memory], sources: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """(float32 logits [rows, V] of what follows, hidden states [rows, backbone] for the next draft).

        tokens: int64 [rows] newest id of each row; embedded: [rows, backbone] their scaled embeddings in the target;
        hidden: [rows, backbone] the target's final-normed state before the newest token, or what the last draft
        returned; memories: the target's, of all before the round's first token; sources: as in `sources`.
        """
        batch = TargetBatch(tokens, memories, sources, self.windows)
        scalars = [layer.get_buffer("layer_scalar") for layer in self.model.layers]
        x = self.model(self.pre_projection(torch.cat([embedded, hidden], -1)), batch, scalars)
        return self.head(x), self.post_projection(x)

    def output_table(self) -> Tensor:
        return self.model.embed_tokens.weight

    def product(self, collapsed: Tensor) -> Tensor:
        if (clusters := self.masked_embedding) is None:
            return super().product(collapsed)
        ordering, k = clusters.get_buffer("token_ordering"), self.config.centroid_intermediate_top_k
        return clustered_logits(collapsed, self.output_table(), clusters.centroids.weight, ordering, k)

    def memory_plan(self, kv: str = "dense", *, layers: tuple[int, int] | None = None, **options: object) -> MemoryPlan:
        raise ValueError(
            f"{self.config.model_type} is a drafter and remembers nothing: load its target and give this as draft="
        )
