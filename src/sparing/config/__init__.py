"""What an architecture is, before any tensor: config.json -> frozen dataclass. Never imports torch.

A config states what its model must remember (`memory_specs`), and which tensors its file must hold, of which shape and
what for (`tensors`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any, TypeVar

from sparing.config.around_gemma4 import AroundGemma4
from sparing.config.protocol import ModelConfig
from sparing.errors import CheckpointError, shown

__all__ = ["ARCHITECTURES", "PLANNED", "parse_config", "planned_config"]

Config = TypeVar("Config", bound=ModelConfig)

# model_type -> (module of the same name in config/ and models/, config class, model class)
ARCHITECTURES: dict[str, tuple[str, str, str]] = {
    "llama": ("llama", "LlamaConfig", "Llama"),
    "mistral": ("llama", "LlamaConfig", "Llama"),
    "qwen2": ("llama", "LlamaConfig", "Llama"),
    "qwen3": ("llama", "LlamaConfig", "Llama"),
    "gemma3": ("gemma3", "Gemma3Config", "Gemma3"),
    "gemma3_text": ("gemma3", "Gemma3Config", "Gemma3"),
    "gemma4": ("gemma4", "Gemma4Config", "Gemma4"),
    "gemma4_text": ("gemma4", "Gemma4Config", "Gemma4"),
    "gemma4_unified": ("gemma4", "Gemma4Config", "Gemma4"),
    "gemma4_unified_text": ("gemma4", "Gemma4Config", "Gemma4"),
    "gemma4_assistant": ("gemma4_drafter", "Gemma4DrafterConfig", "Gemma4Drafter"),
    "gemma4_unified_assistant": ("gemma4_drafter", "Gemma4DrafterConfig", "Gemma4Drafter"),
    "diffusion_gemma": ("diffusion_gemma", "DiffusionGemmaConfig", "DiffusionGemma"),
    "deepseek_v4": ("deepseek_v4", "DeepseekV4Config", "DeepseekV4"),
    "nemotron_h": ("nemotron3", "Nemotron3Config", "Nemotron3"),
}


# model_type -> (module, config class) of architectures that are planned, not run
PLANNED = {"deepseek_v32": ("deepseek_v32", "DeepseekV32Config")}

# pattern of model types that are close to one of these -> what they are
OTHERS = {
    "|".join(PLANNED): "which can be planned, not run",
    r"deepseek_v4[._]?[1-9].*": "DeepSeek-V4.1, another architecture than DeepSeek-V4",
}


def planned_config(raw: Mapping[str, Any]) -> ModelConfig:
    """As `parse_config`, of architectures too that can be planned and not run."""
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in PLANNED:
        return parse_config(raw)
    module, config_class = PLANNED[model_type]
    return _within_vocabulary(getattr(import_module(f"sparing.config.{module}"), config_class).from_dict(raw))


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The config dataclass for a parsed config.json. Raises CheckpointError for an unsupported model_type."""
    model_type = raw.get("model_type")
    for key in ("llm_config", "text_config"):  # wrappers around Nemotron have a model_type for each combination
        inner = raw.get(key)
        if isinstance(inner, Mapping) and inner.get("model_type") in ("nemotron_h", "nemotron_h_puzzle"):
            model_type = "nemotron_h"
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        found = shown(model_type)
        for pattern, what in OTHERS.items():
            if isinstance(model_type, str) and re.fullmatch(pattern, model_type):
                found += f" ({what})"
        raise CheckpointError(f"config.json: model_type is {found}, supported: {', '.join(sorted(ARCHITECTURES))}")
    module, config_class, _ = ARCHITECTURES[model_type]
    return _within_vocabulary(getattr(import_module(f"sparing.config.{module}"), config_class).from_dict(raw))


def _within_vocabulary(config: Config) -> Config:
    """The config without ids beyond the vocabulary, which no text holds: files keep those of a larger one."""
    if isinstance(config, AroundGemma4):
        return replace(config, text=_within_vocabulary(config.text))
    ids = {key: getattr(config, key) for key in ("bos_token_id", "pad_token_id")}
    single = {key: None for key, value in ids.items() if value is not None and value >= config.vocab_size}
    return replace(config, **single, eos_token_ids=tuple(i for i in config.eos_token_ids if i < config.vocab_size))
