"""Compressor, indexer and joint attention against the layers of transformers' DeepSeek-V4, in pieces of any length."""

import pytest
import torch
from transformers import DeepseekV4Config
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as theirs

from sparing.kernels import dispatch
from sparing.kernels.compressor import PooledRow, PoolTable, empty_windows, pool_rows
from sparing.kernels.indexer import select_rows
from sparing.kernels.rows import AttendedRow, RowTable
from sparing.kernels.sparse_attention import attend_joint
from tests.kernel_sets import using
from tests.kernels.row_tables import spans_of

TOKENS, WINDOW, RATES = 61, 6, {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}


def layer_of(kind: str, **more) -> theirs.DeepseekV4Attention:
    """One attention layer, every tensor of it random."""
    config = DeepseekV4Config(
        vocab_size=61,
        hidden_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        head_dim=32,
        qk_rope_head_dim=8,
        q_lora_rank=20,
        o_groups=2,
        o_lora_rank=12,
        sliding_window=WINDOW,
        index_n_heads=16,
        index_head_dim=16,
        index_topk=3,
        layer_types=[kind],
        compress_rates=RATES,
        mlp_layer_types=["moe"],
        **more,
    )
    config._attn_implementation = "eager"
    layer = theirs.DeepseekV4Attention(config, 0).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in layer.named_parameters():
        centre, spread = (1.0, 0.2) if "norm" in name else (0.0, 1.0 if parameter.dim() == 1 or "bias" in name else 0.3)
        parameter.data = centre + spread * torch.randn(parameter.shape, generator=generator)
    return layer


class Pool:
    """One compressor, and what it has made of a text so far."""

    def __init__(self, source, d: int, rotary: theirs.DeepseekV4RotaryEmbedding):
        self.source, self.rotary = source, rotary
        self.windows = empty_windows(1, source.kv_proj.out_features // d, d)
        self.entries = torch.zeros(0, d)

    def take(self, x: torch.Tensor, first: int) -> None:
        source = self.source
        row = PooledRow(len(x), first, self.windows, self.windows)
        pooled = pool_rows(source.kv_proj(x), source.gate_proj(x), source.position_bias, PoolTable([row]), 0)
        pooled = source.kv_norm(pooled)
        positions = source.compress_rate * torch.arange(len(self.entries), len(self.entries) + len(pooled))[None]
        cos, sin = self.rotary(pooled, positions, layer_type="compress")
        self.entries = torch.cat([self.entries, theirs.apply_rotary_pos_emb(pooled[None, None], cos, sin)[0, 0]])

    def table(self, queries: int, end: int) -> RowTable:
        like = self.entries.view(1, 1, 1, *self.entries.shape)
        return RowTable([AttendedRow(spans_of(like, []) if len(self.entries) else [], queries, end)], like)


@torch.no_grad()
def attended(layer: theirs.DeepseekV4Attention, x: torch.Tensor, pieces: list[int]) -> torch.Tensor:
    """What the layer makes of x [T, H], with our kernels."""
    config, outputs, kv, end = layer.config, [], torch.zeros(0, 32), 0
    rotary = theirs.DeepseekV4RotaryEmbedding(config)
    compressor = layer.compressor
    pool = None if compressor is None else Pool(compressor, 32, rotary)
    indexer = getattr(compressor, "indexer", None)
    keys = None if indexer is None else Pool(indexer, 16, rotary)
    m = RATES.get(layer.layer_type, 1)
    for piece in x.split(pieces):
        n, first, end = len(piece), end, end + len(piece)
        cos, sin = rotary(piece, torch.arange(first, end)[None], layer_type=layer.rope_layer_type)
        latent = layer.q_a_norm(layer.q_a_proj(piece))
        q = layer.q_b_norm(layer.q_b_proj(latent).view(1, n, 4, 32))
        q = theirs.apply_rotary_pos_emb(q, cos, sin, 2)[0]
        new = theirs.apply_rotary_pos_emb(layer.kv_norm(layer.kv_proj(piece))[None, None], cos, sin)[0, 0]
        kv = torch.cat([kv, new])[-(WINDOW + n) :]
        window = AttendedRow(spans_of(kv.view(1, 1, 1, *kv.shape), []), n, end, window=WINDOW, dropped=end - len(kv))
        selected = None
        if pool is not None:
            pool.take(piece, first)
        if keys is not None and indexer is not None:
            keys.take(piece, first)
            queries = theirs.apply_rotary_pos_emb(indexer.q_b_proj(latent).view(1, n, 16, 16), cos, sin, 2)[0]
            weights = indexer.scorer.weights_proj(piece)
            selected = select_rows(queries, weights, keys.table(n, end), 0, m=m, k=config.index_topk)
        closed = None if pool is None else pool.table(n, end)
        out = attend_joint(
            q, RowTable([window]), closed, 0, m=m, sinks=layer.sinks.data, scale=layer.scaling, selected=selected
        )
        out = theirs.apply_rotary_pos_emb(out[None], cos, -sin, 2)
        outputs.append(layer.o_b_proj(layer.o_a_proj(out.reshape(1, n, config.o_groups, -1)).flatten(2))[0])
    return torch.cat(outputs)


@torch.no_grad()
def expected(layer: theirs.DeepseekV4Attention, x: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(len(x))
    rotary = theirs.DeepseekV4RotaryEmbedding(layer.config)
    both = {kind: rotary(x, positions[None], layer_type=kind) for kind in ("main", "compress")}
    seen = (positions[:, None] >= positions) & (positions > positions[:, None] - WINDOW)
    mask = torch.zeros(1, 1, len(x), len(x)).masked_fill(~seen, -torch.inf)
    return layer(x[None], both, positions[None], mask)[0][0]


@pytest.mark.parametrize("kernels", sorted({dispatch.REFERENCE, dispatch.available()[-1]}))
@pytest.mark.parametrize("pieces", [[TOKENS], [1] * TOKENS, [5, 1, 1, 7, 30, 17], [33, 28]], ids=len)
@pytest.mark.parametrize("kind", ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"])
def test_attention_layers(kernels, kind, pieces):
    layer, x = layer_of(kind), torch.randn(TOKENS, 48, generator=torch.Generator().manual_seed(1))
    with using(kernels):
        found = attended(layer, x, pieces)
    torch.testing.assert_close(found, expected(layer, x), rtol=1e-4, atol=1e-4)
