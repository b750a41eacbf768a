"""Which biases of key projections are split off before keys become codes: those that turn as ours do, and no others."""

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Ernie4_5Config,
    Ernie4_5ForCausalLM,
    Glm4Config,
    Glm4ForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    HunYuanDenseV1Config,
    HunYuanDenseV1ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from sparing.plugins.transformers_cache import TurboQuantCache
from tests.tiny import SIZES

CONFIG = SIZES | {"num_hidden_layers": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HALVES = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**CONFIG)),
    "llama": (LlamaForCausalLM, LlamaConfig(**CONFIG, attention_bias=True)),
    "llama, part": (
        LlamaForCausalLM,
        LlamaConfig(
            **CONFIG, attention_bias=True, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
        ),
    ),
}
OTHERS = {
    "glm": (GlmForCausalLM, GlmConfig(**CONFIG, attention_bias=True)),
    "glm-4": (Glm4ForCausalLM, Glm4Config(**CONFIG, attention_bias=True)),
    "ernie-4.5": (Ernie4_5ForCausalLM, Ernie4_5Config(**CONFIG, use_bias=True)),
    "hunyuan": (HunYuanDenseV1ForCausalLM, HunYuanDenseV1Config(**CONFIG, attention_bias=True)),
    "cohere": (CohereForCausalLM, CohereConfig(**CONFIG, attention_bias=True)),
}


def built(kind: Any, config: Any) -> Any:
    """A random model whose keys are mostly bias, as Qwen2's are."""
    torch.manual_seed(0)
    model = kind(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("k_proj.bias"):
            parameter.data.normal_(std=6.0)
        elif name.endswith("_proj.weight"):
            parameter.data.normal_(std=0.12)
    return model


def error(model: Any, cache: Any, exact: Any) -> float:
    """Of the logits of tokens that follow a prompt, read over the cache."""
    ids = torch.randint(3, 61, (1, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for past in (cache, exact):
            model(ids[:, :192], past_key_values=past)
        found, expected = (model(ids[:, 192:], past_key_values=past).logits for past in (cache, exact))
    return (found - expected).norm().item() / expected.norm().item()


@pytest.mark.parametrize(("kind", "config"), [*HALVES.values(), *OTHERS.values()], ids=[*HALVES, *OTHERS])
def test_never_less_exact_than_without(kind, config, monkeypatch):
    from transformers import DynamicCache

    model = built(kind, config)
    with_biases = TurboQuantCache(model, 3)
    off = error(model, with_biases, DynamicCache(config=model.config))
    without = TurboQuantCache(model, 3)
    without._biases = [None] * len(without._biases)
    plain = error(model, without, DynamicCache(config=model.config))
    is_split = (kind, config) in HALVES.values()
    assert [bias is not None for bias in with_biases._biases] == [is_split] * 2
    assert off < 0.7 * plain if is_split else off == plain
