"""What a Gemma 4 stack computes that transformers cannot be asked for."""

import pytest
import torch
from torch import Tensor

from tests.tiny import FULL, GEMMA, SLIDING, built

HEAD_DIMS = (8, 12, 16, 24)
CONFIG = GEMMA | {
    "num_hidden_layers": 4,
    "layer_types": [SLIDING, SLIDING, FULL, FULL],
    "per_layer_config": {str(i): {"head_dim": d} for i, d in enumerate(HEAD_DIMS)},
    "rope_parameters": {
        SLIDING: {"rope_type": "default", "rope_theta": 500.0},
        FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 2e4},
    },
}


class Recorder:
    """A batch in which nobody attends; it keeps the queries and keys of every layer."""

    hidden = None

    def __init__(self, ids: Tensor):
        self.ids, self.positions = ids, 3 + 7 * torch.arange(len(ids))
        self.seen: list[tuple[Tensor, Tensor]] = []

    @property
    def lengths(self) -> Tensor:
        return self.positions + 1

    def attend(self, layer: int, q: Tensor, k: Tensor | None, v: Tensor | None, scale: float = 1.0) -> Tensor:
        assert k is not None
        self.seen.append((q, k))
        return torch.zeros_like(q)

    def narrow(self) -> None:
        return None


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()


@pytest.mark.parametrize("layer", range(4))
def test_each_layer_turns_by_its_own_head_size(layer: int) -> None:
    """Queries and keys against float64, where layers of one kind differ in head size."""
    model = built(CONFIG)
    batch, trace = Recorder(torch.arange(6)), []
    with torch.inference_mode():
        model(batch, trace)
    block, d = model.model.layers[layer], HEAD_DIMS[layer]
    h = norm(trace[layer].double(), block.input_layernorm.weight)
    m = torch.arange(d // 2).double()
    angles = 500.0 ** (-2 * m / d) if layer < 2 else torch.where(m < d // 4, 2e4 ** (-2 * m / d), 0.0)
    turn = torch.polar(torch.ones(()).double(), batch.positions[:, None].double() * angles)[:, None]  # [T, 1, d / 2]
    for got, side in zip(batch.seen[layer], ("q", "k"), strict=True):
        projection, weight = getattr(block.self_attn, f"{side}_proj"), getattr(block.self_attn, f"{side}_norm").weight
        x = norm((h @ projection.weight.double().T).unflatten(-1, (-1, d)), weight)
        turned = torch.complex(x[..., : d // 2], x[..., d // 2 :]) * turn
        assert torch.allclose(got.double(), torch.cat([turned.real, turned.imag], -1), atol=1e-4)
