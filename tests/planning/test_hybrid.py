"""Parameters, memory and work of Mamba hybrids with latent experts against published figures and closed forms."""

import pytest

from sparing.config import parse_config
from sparing.config.released import RELEASED
from sparing.config.roles import KINDS
from sparing.planning import plan
from sparing.planning.experts import moe_layer_cost
from sparing.planning.memory import hybrid_cache_bytes
from sparing.planning.parameters import count_parameters
from sparing.planning.roofline import decode_pass, prefill_pass, weights_read

SIZES = ("nano", "super", "ultra")


def config(size):
    return parse_config(RELEASED[f"nemotron-3-{size}"])


def cache_bytes(size, tokens, **options):
    c = config(size)
    pattern = RELEASED[f"nemotron-3-{size}"]["hybrid_override_pattern"]
    geometry = (c.num_key_value_heads, c.head_dim, c.mamba_num_heads, c.mamba_head_dim)
    return hybrid_cache_bytes(pattern, tokens, *geometry, c.ssm_state_size, c.n_groups, c.conv_kernel, **options)


@pytest.mark.parametrize(
    ("size", "parameters", "active", "without_embedding"),
    [
        ("nano", 31_577_937_344, 3_580_073_408, 3_227_751_872),
        ("super", 120_668_687_360, 12_770_216_960, 12_233_346_048),
        ("ultra", 549_308_968_960, 56_058_818_560, 54_985_076_736),
    ],
)
def test_parameters_are_the_published_ones(size, parameters, active, without_embedding):
    result = plan(f"nemotron-3-{size}", context=1)
    assert (result.parameters, result.active_parameters) == (parameters, active)
    assert active - config(size).vocab_size * config(size).hidden_size == without_embedding
    heads, layers = config(size).mamba_num_heads, config(size).layers.count("mamba")
    assert result.weight_bytes == 2 * parameters + 2 * 3 * heads * layers  # A_log, D and dt_bias stay in float32


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("mamba", (38_744_896, 109_640_064, 421_645_056)),
        ("moe", (1_297_468_032, 2_873_102_336, 10_942_947_328)),
        ("attention", (23_399_040, 35_655_680, 138_420_224)),
    ],
)
def test_parameters_of_one_layer(kind, expected):
    for size, count in zip(SIZES, expected, strict=True):
        prefix = f"backbone.layers.{config(size).layers.index(kind)}."
        tensors = {n: tensor for n, tensor in config(size).tensors().items() if n.startswith(prefix)}
        assert sum(count_parameters(tensors).values()) == count


def test_worked_cache_bytes():
    held = cache_bytes("super", 262144)
    assert held == {"kv": 2_147_483_648, "ssm": 167_772_160, "conv": 2_457_600, "total": 2_317_713_408}
    assert cache_bytes("super", 0)["kv"] == 0
    assert cache_bytes("nano", 1)["kv"] == 6144
    everywhere = hybrid_cache_bytes("*" * 88, 1, 2, 128, 128, 64, 128, 8, 4)["kv"]
    assert everywhere == 11 * cache_bytes("super", 1)["kv"]
    with pytest.raises(ValueError, match="'X'"):
        hybrid_cache_bytes("MX", 1, 2, 128, 128, 64, 128, 8, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": -1}, "tokens is -1: use at least 0"),
        ({"tokens": 1.5}, "tokens is 1.5: use a whole number of at least 0"),
        ({"state": -128}, "state is -128"),
        ({"kernel": 0}, "kernel is 0: use at least 1"),
    ],
)
def test_bytes_of_what_cannot_be(change, message):
    sizes = {"tokens": 1, "kv_heads": 2, "head_dim": 128, "mamba_heads": 128, "mamba_head_dim": 64}
    with pytest.raises(ValueError, match=message):
        hybrid_cache_bytes("M*", **sizes | {"state": 128, "groups": 8, "kernel": 4} | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 9}, "k is 9: a token cannot use more than all 8 experts"),
        ({"k": 0}, "k is 0: use at least 1"),
        ({"latent": 0}, "latent is 0"),
        ({"tokens": -1}, "tokens is -1: use at least 0"),
        ({"shared": -5}, "shared is -5"),
        ({"bytes_per_weight": 0}, "bytes_per_weight is 0"),
    ],
)
def test_layers_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        moe_layer_cost(**{"H": 64, "F": 32, "E": 8, "k": 2} | change)


@pytest.mark.parametrize(("size", "tokens"), [("super", 20780), ("nano", 7989), ("ultra", 33200)])
def test_where_keys_outgrow_the_states(size, tokens):
    below, above = cache_bytes(size, tokens - 1), cache_bytes(size, tokens)
    assert below["kv"] <= below["ssm"] + below["conv"]
    assert above["kv"] >= above["ssm"] + above["conv"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tokens", [1, 4096, 1_048_576])
def test_the_plan_holds_the_same_bytes(size, tokens):
    held = cache_bytes(size, tokens)
    result = plan(f"nemotron-3-{size}", context=tokens, batch=3)
    assert result.memory_bytes == 3 * held["total"]
    assert result.memory_by_kind == {"full": 3 * held["kv"], "recurrent": 3 * (held["ssm"] + held["conv"])}


@pytest.mark.parametrize("size", SIZES)
def test_states_of_16_bits(size):
    """Half of the bytes held, and of those read and written; nothing else changes but the time."""
    options = {"context": 9000, "batch": 5, "new_tokens": 1000, "hardware": "B200"}
    wide, narrow = (plan(f"nemotron-3-{size}", ssm_dtype=dtype, **options) for dtype in (None, "float16"))
    saved = cache_bytes(size, 0)["ssm"] // 2
    assert cache_bytes(size, 9000, ssm_bytes=2)["total"] * 5 == narrow.memory_bytes == wide.memory_bytes - 5 * saved
    assert wide.bytes_per_token - narrow.bytes_per_token == pytest.approx(2 * saved)
    assert narrow.flops_per_token == wide.flops_per_token and narrow.weight_bytes == wide.weight_bytes
    for slow, fast in (
        (wide.seconds_per_token, narrow.seconds_per_token),
        (wide.generation_seconds, narrow.generation_seconds),
    ):
        assert slow is not None and fast is not None and fast < slow
    with pytest.raises(ValueError, match="ssm_dtype='float8' is not known, use float32, bfloat16, float16"):
        plan(f"nemotron-3-{size}", context=1, ssm_dtype="float8")
    with pytest.raises(ValueError, match="no layer of this model keeps a recurrent state"):
        plan("qwen3-8b", context=1, ssm_dtype="float16")


def test_decoding_against_attention_that_remembers_everything():
    """Super's rate on one accelerator for 8k tokens in and 64k out, with 16-bit states and with 32."""
    bandwidth, room, length = 8e12, 170e9, 8192 + 65536 / 2

    def rate(held: float, moved: float, weights: float) -> float:
        sequences = (room - weights) / held
        return sequences / ((weights + sequences * moved) / bandwidth)

    peer = 18_432 * length + 2.36e6
    peer_rate = rate(peer, peer, 65.3e9)
    for dtype, expected in (("float16", 2.16), ("float32", 1.52)):
        one = plan("nemotron-3-super", context=1, ssm_dtype=dtype)
        state = one.memory_by_kind["recurrent"]
        kv = 4096 * length  # in FP8
        assert rate(kv + state, kv + 2 * state, 80.3e9) / peer_rate == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("kv", ["triattention:2048", "triattention:2048+turboquant:3"])
def test_what_pruning_layers_without_rotation_asks_for_is_said(kv):
    notes = plan("nemotron-3-super", context=9000, kv=kv).notes
    assert [note for note in notes if "RoPE" in note] == [
        "layer 7 has no RoPE: pruning it, by content alone, needs triattention:2048,allow_nope=true"
    ]
    for model, policy in (("nemotron-3-super", "turboquant:3"), ("qwen3-8b", kv)):
        assert not any("RoPE" in note for note in plan(model, context=9000, kv=policy).notes)


def test_worked_layer_costs():
    assert moe_layer_cost(4096, 2688, 512, 22, latent=1024, shared=5376)["flops"] == 351_272_960
    assert moe_layer_cost(2688, 1856, 128, 6, shared=3712)["flops"] == 160_333_824
    assert moe_layer_cost(8192, 5120, 512, 22, latent=2048, shared=10240)["flops"] == 1_333_788_672
    for tokens, hit in {1: 22.0, 8: 151.7, 64: 481.2, 256: 512.0}.items():
        cost = moe_layer_cost(4096, 2688, 512, 22, latent=1024, tokens=tokens)
        assert cost["expected_experts"] == pytest.approx(hit, abs=0.05)
        assert cost["intensity"] == cost["flops"] / cost["weight_bytes"]
    assert moe_layer_cost(4096, 2688, 512, 22, latent=1024)["all_to_all_bytes"] == 45_056
    assert moe_layer_cost(4096, 2688, 512, 22)["all_to_all_bytes"] == 180_224


def test_latent_experts_cost_what_fewer_wide_ones_do():
    """alpha times as many experts and active experts at H / alpha: the same routed work and traffic."""
    wide = moe_layer_cost(4096, 2688, 128, 6)
    narrow = moe_layer_cost(4096, 2688, 512, 24, latent=1024)
    router_and_projections = 2 * (2 * 4096 * 1024 + (512 - 128) * 4096)
    assert narrow["flops"] - router_and_projections == wide["flops"]
    assert narrow["all_to_all_bytes"] == wide["all_to_all_bytes"]


@pytest.mark.parametrize("size", SIZES)
def test_work_of_a_decoding_step(size):
    c = config(size)
    one = decode_pass(c, c.memory_specs(), context=1000, batch=1, bits=dict.fromkeys(KINDS, 16))
    latent = {} if c.moe_latent_size is None else {"latent": c.moe_latent_size}
    expert = (c.hidden_size, c.moe_intermediate_size, c.num_experts, c.top_k_experts)
    moe = moe_layer_cost(*expert, shared=c.moe_shared_expert_intermediate_size, **latent)["flops"]
    inner, conv = c.mamba_size, c.conv_size
    mamba = 2 * (c.hidden_size * (2 * inner + conv + c.mamba_num_heads) + conv * c.conv_kernel)
    mamba += 4 * inner * c.ssm_state_size
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    attention = 2 * (2 * q + 2 * kv) * c.hidden_size + 4 * q * 1001
    layers = {"mamba": mamba, "moe": moe, "attention": attention}
    assert one.flops == sum(layers[kind] for kind in c.layers) + 2 * c.vocab_size * c.hidden_size
    prompt = [prefill_pass(c, c.memory_specs(), tokens=n, batch=1, bits=dict.fromkeys(KINDS, 16)) for n in (100, 101)]
    last = c.layers[: c.memory_layers[-1] + 1]
    attention -= 4 * q * (1001 - 101)
    assert prompt[1].flops - prompt[0].flops == sum({**layers, "attention": attention}[kind] for kind in last)


def test_bytes_of_a_decoding_step():
    """A state is read and written; experts are read as far as chosen."""
    c = config("super")
    specs, bits = c.memory_specs(), dict.fromkeys(KINDS, 16)
    held = cache_bytes("super", 1000)
    weights = weights_read(c, 4, bits)
    step = decode_pass(c, specs, context=1000, batch=4, bits=bits)
    assert step.nbytes - weights == 4 * (held["kv"] + 2 * (held["ssm"] + held["conv"]))
    only_experts = dict.fromkeys(KINDS, 0) | {"experts": 8}
    assert weights_read(c, 1, only_experts) == pytest.approx(40 * 22 * 2 * 1024 * 2688)
