"""Drafters of Gemma 4: config.json -> frozen description. Never imports torch.

Source: the released configurations and transformers' `configuration_gemma4_assistant.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparing.config.around_gemma4 import AroundGemma4
from sparing.config.fields import Fields
from sparing.config.gemma4 import Gemma4Config
from sparing.config.roles import CONSTANT, DRAFTING_TABLE, MATRIX, ROUTER, Tensors
from sparing.errors import shown

__all__ = ["Gemma4DrafterConfig"]


@dataclass(frozen=True)
class Gemma4DrafterConfig(AroundGemma4):
    """`text` describes the drafter's own small stack, none of whose layers makes keys or values.

    backbone_hidden_size: of the target; num_centroids: clusters of the output head (0: it is a plain product);
    centroid_intermediate_top_k: clusters whose tokens are scored.
    """

    backbone_hidden_size: int
    num_centroids: int
    centroid_intermediate_top_k: int

    model_type = "gemma4_assistant"
    canvas_length = None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Gemma4DrafterConfig:
        """Parse config.json. Raises CheckpointError naming the key for missing or contradictory values."""
        outer = Fields(raw)
        fields = Fields(outer.get("text_config"), "config.json: text_config")
        for key in ("hidden_size_per_layer_input", "vocab_size_per_layer_input"):
            if fields.raw.get(key):
                raise fields.error(f"{key} is {shown(fields.raw[key])}: a drafter has no per-layer inputs")
        for key in ("enable_moe_block", "use_double_wide_mlp"):
            if fields.raw.get(key):
                raise fields.error(f"{key} is {shown(fields.raw[key])}: a drafter's layers are plain")
        text = Gemma4Config.from_text(fields, raw, is_drafter=True)
        outer.ignore(*(key for key in raw if key.endswith(("_token_id", "_token_index"))))
        if not outer.boolean("tie_word_embeddings", True):
            raise outer.error("tie_word_embeddings is false: a drafter's head is its embedding table")
        clustered = outer.boolean("use_ordered_embeddings", False)
        centroids = outer.integer("num_centroids", 2048)
        top_k = outer.integer("centroid_intermediate_top_k", 32)
        if clustered and text.vocab_size % centroids:
            raise outer.error(f"vocab_size {text.vocab_size} is not a multiple of num_centroids {centroids}")
        if clustered and top_k > centroids:
            raise outer.error(f"centroid_intermediate_top_k is {top_k}, there are only {centroids} centroids")
        return cls(
            text=text,
            backbone_hidden_size=outer.integer("backbone_hidden_size", 1536),
            num_centroids=centroids if clustered else 0,
            centroid_intermediate_top_k=top_k,
            unknown={**outer.harmless("gemma4_assistant"), **text.unknown},
        )

    def untied(self, file: str) -> Gemma4DrafterConfig:
        """The same: the head that `file` holds is the only table."""
        return self

    def tolerated_tensors(self) -> tuple[str, ...]:
        """Patterns of whole names that may be present and mean nothing, as an embedding beside the head."""
        return (*self.text.tolerated_tensors(), r"model\.embed_tokens\.weight")

    def tensors(self) -> Tensors:
        """Checkpoint name -> (shape, role): everything that must be in the file."""
        h, backbone = self.text.hidden_size, self.backbone_hidden_size
        tensors = self.text.stack_tensors("model.", DRAFTING_TABLE)
        for i in range(self.text.num_hidden_layers):
            tensors[f"model.layers.{i}.layer_scalar"] = ((1,), CONSTANT)
        tensors["pre_projection.weight"] = ((h, 2 * backbone), MATRIX)
        tensors["post_projection.weight"] = ((backbone, h), MATRIX)
        if self.num_centroids:
            tensors["masked_embedding.centroids.weight"] = ((self.num_centroids, h), ROUTER)
            tensors["masked_embedding.token_ordering"] = ((self.text.vocab_size,), CONSTANT)
        return tensors
