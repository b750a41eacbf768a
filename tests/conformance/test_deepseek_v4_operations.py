"""Operations of DeepSeek-V4 against the modules of transformers that do the same, in every set of kernels."""

import pytest
import torch
from transformers import DeepseekV4Config
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as reference

from sparing import kernels
from sparing.config.rope import RopeParameters
from sparing.kernels import dispatch
from sparing.models.layers import GatedMLP
from tests.kernel_sets import using

HEADS, D, TURNING = 4, 32, 8
CONFIG = DeepseekV4Config(
    vocab_size=61,
    hidden_size=48,
    moe_intermediate_size=24,
    num_hidden_layers=5,
    num_attention_heads=HEADS,
    head_dim=D,
    partial_rotary_factor=TURNING / D,
    q_lora_rank=20,
    o_groups=2,
    o_lora_rank=12,
    n_routed_experts=8,
    num_experts_per_tok=3,
    swiglu_limit=1.5,
    num_hash_layers=2,
    rope_parameters={"type": "yarn", "factor": 16, "original_max_position_embeddings": 64},
)
ROTATIONS = {
    "main": RopeParameters("default", 10_000.0, TURNING / D),
    "compress": RopeParameters(
        "yarn", 160_000.0, TURNING / D, factor=16.0, original_max_position_embeddings=64, attention_factor=1.0
    ),
}
TOKENS = (1, 5, 8, 37)


@pytest.fixture(params=dispatch.available(), autouse=True, scope="module")
def kernel_set(request):
    with using(request.param):
        yield request.param


def randomised(module):
    """Also what transformers initialises to a constant, or not at all."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.data.normal_(0, 0.5)
        else:
            tensor.random_(0, CONFIG.n_routed_experts)
    return module.eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ROTATIONS)
@pytest.mark.parametrize(("tokens", "heads", "d"), [(1, HEADS, D), (7, HEADS, D), (37, 1, D), (5, 16, 16)])
def test_rotations(kind, tokens, heads, d):
    """Frequencies, tables, and the turn of the last dimensions of a head by neighbouring pairs, there and back."""
    theirs = reference.DeepseekV4RotaryEmbedding(CONFIG)
    inv_freq, factor = kernels.inverse_frequencies(ROTATIONS[kind], D)
    torch.testing.assert_close(inv_freq, getattr(theirs, f"{kind}_inv_freq"), rtol=3e-7, atol=0)
    assert factor == 1.0
    x, positions = torch.randn(tokens, heads, d), torch.arange(tokens) * 3 + 11
    their_cos, their_sin = theirs(x, positions[None], layer_type=kind)
    expected = reference.apply_rotary_pos_emb(x.transpose(0, 1)[None], their_cos, their_sin)[0].transpose(0, 1)
    cos, sin = kernels.rope_tables(positions, inv_freq, torch.float32)
    found = kernels.rotate(x, cos, sin, layout="pairs", last=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    back = kernels.rotate(found, cos, -sin, layout="pairs", last=True)
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scoring", ["sqrtsoftplus", "sigmoid", "softmax"])
@pytest.mark.parametrize("kind", ["score", "hash"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_routers(kind, scoring, tokens):
    theirs = randomised(
        getattr(reference, "DeepseekV4TopKRouter" if kind == "score" else "DeepseekV4HashRouter")(CONFIG)
    )
    if scoring != "sqrtsoftplus":
        theirs.score_fn = torch.nn.Sigmoid() if scoring == "sigmoid" else torch.nn.Softmax(-1)
    x, tokens_ids = 3 * torch.randn(tokens, CONFIG.hidden_size), torch.randint(0, CONFIG.vocab_size, (tokens,))
    k, scale = CONFIG.num_experts_per_tok, CONFIG.routed_scaling_factor
    if kind == "score":
        _, expected, their_ids = theirs(x)
        ids, weights = kernels.route(x, theirs.weight, theirs.e_score_correction_bias, k, scale=scale, scoring=scoring)
    else:
        _, expected, their_ids = theirs(x, tokens_ids)
        chosen = theirs.tid2eid[tokens_ids]
        ids, weights = kernels.route(x, theirs.weight, None, k, scale=scale, scoring=scoring, ids=chosen)
        assert torch.equal(ids, chosen)
    order, their_order = ids.argsort(-1), their_ids.argsort(-1)
    assert torch.equal(ids.gather(-1, order), their_ids.gather(-1, their_order))
    torch.testing.assert_close(weights.gather(-1, order), expected.gather(-1, their_order), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", TOKENS)
def test_experts(tokens):
    theirs = randomised(reference.DeepseekV4Experts(CONFIG))
    x, k = torch.randn(tokens, CONFIG.hidden_size), CONFIG.num_experts_per_tok
    ids = torch.stack([torch.randperm(CONFIG.n_routed_experts)[:k] for _ in range(tokens)])
    weights = torch.rand(tokens, k)
    found = kernels.grouped_experts(
        x, weights, ids, theirs.gate_up_proj, theirs.down_proj, kernels.gated_silu, CONFIG.swiglu_limit
    )
    torch.testing.assert_close(found, theirs(x, ids, weights), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("tokens", TOKENS)
def test_shared_expert(tokens):
    theirs = randomised(reference.DeepseekV4MLP(CONFIG))
    ours = GatedMLP(CONFIG.hidden_size, CONFIG.intermediate_size, "silu", limit=CONFIG.swiglu_limit)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(tokens, CONFIG.hidden_size)
    expected = theirs(x)
    torch.testing.assert_close(ours.requires_grad_(False)(x), expected, rtol=1e-5, atol=2e-5)
    ours.limit = float("inf")
    assert not torch.allclose(ours(x), expected, rtol=0.1)  # limits are met


@pytest.mark.parametrize("tokens", TOKENS)
def test_grouped_output_projection(tokens):
    size = HEADS * D // CONFIG.o_groups
    theirs = reference.DeepseekV4GroupedLinear(size, CONFIG.o_groups * CONFIG.o_lora_rank, CONFIG.o_groups)
    randomised(theirs)
    x = torch.randn(tokens, CONFIG.o_groups, size)
    weight = theirs.weight.unflatten(0, (CONFIG.o_groups, -1))
    torch.testing.assert_close(kernels.grouped_linear(x, weight), theirs(x[None])[0], rtol=1e-5, atol=1e-5)
