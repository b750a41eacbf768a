"""DiffusionGemma: a Gemma 4 MoE stack run as causal encoder and as bidirectional denoiser. Never imports torch.

Source: the released config.json and transformers' `configuration_diffusion_gemma.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparing.config.around_gemma4 import AroundGemma4
from sparing.config.fields import Fields
from sparing.config.gemma4 import Gemma4Config
from sparing.config.names import HEAD_NAMES
from sparing.config.roles import (
    CONSTANT,
    MIXED_TABLE,
    SELF_CONDITIONING,
    SELF_CONDITIONING_NORM,
    SELF_CONDITIONING_UP,
    Tensors,
)
from sparing.errors import CheckpointError, shown

__all__ = ["DiffusionGemmaConfig"]


@dataclass(frozen=True)
class DiffusionGemmaConfig(AroundGemma4):
    """`text` describes the one stack; `canvas_length` is the number of tokens denoised at once."""

    canvas_length: int

    model_type = "diffusion_gemma"

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> DiffusionGemmaConfig:
        """Parse config.json. Raises CheckpointError naming the key for missing or contradictory values."""
        outer = Fields(raw)
        fields = Fields(outer.get("text_config"), "config.json: text_config")
        if size := fields.raw.get("hidden_size_per_layer_input"):
            raise fields.error(f"hidden_size_per_layer_input is {shown(size)}: this model has no per-layer inputs")
        text = Gemma4Config.from_text(
            fields,
            raw,
            always_value_is_key=True,
            always_moe=True,
            default_softcap=30.0,
        )
        outer.ignore("vision_config", "boi_token_id", "eoi_token_id", "image_token_id", "eos_token_id")
        if not outer.boolean("tie_word_embeddings", True):
            raise outer.error("tie_word_embeddings is false: encoder and denoiser must share their weights")
        canvas_length = outer.integer("canvas_length", 256)
        unknown = {**outer.harmless("diffusion_gemma"), **text.unknown}
        return cls(text=text, unknown=unknown, canvas_length=canvas_length)

    def copy_of(self, name: str) -> str | None:
        """Which tensor this one of a file must equal: the encoder is the denoiser except for its layer scalars."""
        copy = re.fullmatch(r"model\.encoder\.language_model\.(embed_tokens\..*|norm\..*|layers\..*)", name)
        return None if copy is None or name.endswith(".layer_scalar") else f"model.decoder.{copy[1]}"

    def untied(self, file: str) -> DiffusionGemmaConfig:
        """Raises CheckpointError: predictions are mixed from the table that judged them."""
        raise CheckpointError(f"{file}: lm_head.weight differs from the embedding, which is the head of this model")

    def tensors(self) -> Tensors:
        """Checkpoint name -> (shape, role): everything that must be in the file."""
        h, width = self.text.hidden_size, self.text.layers[0].intermediate_size
        tensors = self.text.stack_tensors("model.decoder.", MIXED_TABLE)
        for i in range(self.text.num_hidden_layers):
            tensors[f"model.decoder.layers.{i}.layer_scalar"] = ((1,), CONSTANT)
            tensors[f"model.encoder.language_model.layers.{i}.layer_scalar"] = ((1,), CONSTANT)
        tensors["model.decoder.self_conditioning.pre_norm.weight"] = ((h,), SELF_CONDITIONING_NORM)
        tensors["model.decoder.self_conditioning.gate_proj.weight"] = ((width, h), SELF_CONDITIONING_UP)
        tensors["model.decoder.self_conditioning.up_proj.weight"] = ((width, h), SELF_CONDITIONING_UP)
        tensors["model.decoder.self_conditioning.down_proj.weight"] = ((h, width), SELF_CONDITIONING)
        return tensors

    def tolerated_tensors(self) -> tuple[str, ...]:
        """Patterns of whole names that may be present and mean nothing: the vision tower and tied duplicates."""
        return (
            r"model\.(encoder\.)?(vision_tower|embed_vision)\..*",
            r"model\.encoder\.language_model\.(embed_tokens|norm|layers\.\d+\.(?!layer_scalar$)).*",
            r".*rotary_emb\..*",
            HEAD_NAMES.pattern,
        )
