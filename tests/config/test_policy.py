"""The policy language: what it changes in a memory, and how mistakes are named."""

import re
from dataclasses import replace

import pytest

from sparing.config.memory import AttentionSpec, CompressedSpec, Indexer, RecurrentSpec, Rounds
from sparing.config.policy import apply_policy, parse_policy, policy_options, same_policy, settled

SPECS = [
    AttentionSpec(2, 8),
    AttentionSpec(2, 8, window=5),
    AttentionSpec(1, 16, value_only=True),
    AttentionSpec(2, 8, shared_with=0),
]


def test_dense_changes_nothing():
    assert apply_policy(SPECS, parse_policy("dense")) == SPECS


def test_a_window_bounds_what_grows_and_nothing_else():
    windowed = apply_policy(SPECS, parse_policy("window:3"))
    assert [spec.window for spec in windowed] == [3, 5, 3, 3]
    assert [spec.entries(100) for spec in windowed] == [2, 4, 2, 0]
    assert [spec.entries(1) for spec in windowed] == [1, 1, 1, 0]


@pytest.mark.parametrize("kv", ["dens", "", "window", "window:", "window:-3", "window:2.5", "dense ", "Window:3"])
def test_a_typo_names_what_there_is(kv):
    with pytest.raises(ValueError, match=r"is not a memory policy, use dense, window:N, triattention:N, turboquant"):
        parse_policy(kv)


def test_a_window_of_nothing():
    with pytest.raises(ValueError, match="at least one token"):
        parse_policy("window:0")


def test_two_of_a_kind_clash():
    with pytest.raises(ValueError, match="'window:4' clashes"):
        parse_policy("window:3+window:4")


def test_an_option_that_no_part_takes():
    with pytest.raises(
        ValueError, match="'window:3' takes no option 'size', it knows: ssm_dtype, ssm_rounding, ssm_seed"
    ):
        parse_policy("window:3", {"size": 4})
    assert policy_options("dense") == ["ssm_dtype", "ssm_rounding", "ssm_seed"]


@pytest.mark.parametrize(
    ("text", "kv", "options"),
    [
        ("turboquant:4,window=128,sink_tokens=4", "turboquant:4", {"window": 128, "sink_tokens": 4}),
        ("turboquant:k8v4,seed=3,skip_layers=0:-1", "turboquant:k8v4", {"seed": 3, "skip_layers": (0, -1)}),
        (
            "triattention:64,mode=global,trig=false+turboquant:3,window=2,protect_recent=2",
            "triattention:64+turboquant:3",
            {"mode": "global", "trig": False, "window": 2, "protect_recent": 2},
        ),
        ("dense,ssm_dtype=bfloat16", "dense", {"ssm_dtype": "bfloat16"}),
        ("released,ssm_seed=4", "released", {"ssm_seed": 4}),
    ],
)
def test_options_in_the_text_are_those_given_apart(text, kv, options):
    if text.startswith("triattention"):  # an option belongs to the part that it follows
        with pytest.raises(ValueError, match="turboquant:3 takes no option 'protect_recent=2'"):
            parse_policy(text)
        text = "triattention:64,mode=global,trig=false,protect_recent=2+turboquant:3,window=2"
    stated, apart = parse_policy(text), parse_policy(kv, options)
    assert stated == replace(apart, kv=text)
    assert parse_policy(str(apart)) == replace(apart, kv=str(apart))
    assert parse_policy(text, options) == apart  # said twice, but the same


@pytest.mark.parametrize(
    ("kv", "options", "message"),
    [
        ("turboquant:4,window=128", {"window": 64}, "states window=128, and window=64 is given too"),
        ("turboquant:4,window=many", {}, "window is 'many', expected a whole number"),
        ("triattention:9,trig=1", {}, "trig is '1', expected true or false"),
        ("turboquant:4,skip_layers=a", {}, "skip_layers is 'a', expected whole numbers, as in 0:1:-1"),
        ("turboquant:4,window", {}, "takes no option 'window', write name=value"),
        ("turboquant:4,interval=3", {}, "takes no option 'interval=3', write name=value with one of: scale"),
        ("turboquant:4,k_bits=3", {}, "takes no option 'k_bits=3'"),
        ("turboquant:4,", {}, "takes no option ''"),
        ("dense,window=3", {}, "dense takes no option 'window=3'"),
        ("dense,ssm_seed=1+turboquant:4", {}, "is not a memory policy"),
        ("turboquant:4,window=-1", {}, "window is -1"),
    ],
)
def test_an_option_in_the_text_that_is_wrong(kv, options, message):
    with pytest.raises(ValueError, match=message):
        parse_policy(kv, options)


def test_states_are_kept_as_asked_beside_any_policy():
    state = RecurrentSpec(4, 8, 16, 2, 4)
    kept = apply_policy([state, None, *SPECS], parse_policy("window:3", {"ssm_dtype": "float16"}))
    assert kept[0] == replace(state, state_dtype="float16")
    assert kept[1] is None
    assert state.nbytes(0, 2) - kept[0].nbytes(9, 2) == 2 * 4 * 8 * 16
    assert apply_policy([state], parse_policy("dense")) == [state]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ssm_dtype": "int8"}, "ssm_dtype='int8' is not known, use float32, bfloat16, float16"),
        ({"ssm_rounding": "up"}, "ssm_rounding='up' is not known, use stochastic, nearest"),
        ({"ssm_seed": -1}, "ssm_seed is -1"),
    ],
)
def test_unknown_states(options, message):
    with pytest.raises(ValueError, match=message):
        parse_policy("dense", options)


def test_a_state_that_no_layer_keeps():
    with pytest.raises(ValueError, match="no layer of this model keeps a recurrent state"):
        apply_policy(SPECS, parse_policy("dense", {"ssm_dtype": "float16"}))


def test_bytes_of_a_spec():
    assert AttentionSpec(2, 8).nbytes(10, 2) == 2 * 10 * 2 * 8 * 2
    assert AttentionSpec(2, 8, value_only=True).nbytes(10, 2) == 10 * 2 * 8 * 2
    assert AttentionSpec(2, 8, window=5).nbytes(3, 4) == 2 * 3 * 2 * 8 * 4
    assert AttentionSpec(2, 8, window=5).nbytes(300, 4) == 2 * 4 * 2 * 8 * 4
    assert AttentionSpec(2, 8, window=1).nbytes(300, 4) == 0
    assert AttentionSpec(2, 8, shared_with=0).nbytes(300, 4) == 0


def test_a_budget_cuts_back_what_grows_and_nothing_else():
    pruned = apply_policy(SPECS, parse_policy("triattention:20", {"interval": 4}))
    assert [spec.rounds for spec in pruned] == [Rounds(20, 4), None, Rounds(20, 4), Rounds(20, 4)]
    assert [spec.window for spec in pruned] == [None, 5, None, None]
    # A key and a value, or a value alone; and 4 bytes for the position of what a round has kept.
    assert pruned[0].nbytes(23, 2) == 23 * 2 * (2 * 8 * 2)
    assert pruned[0].nbytes(24, 2) == 20 * 2 * (2 * 8 * 2 + 4)
    assert pruned[2].nbytes(25, 2) == 21 * 16 * 2 + 20 * 4
    with pytest.raises(ValueError, match="no layer of this model grows"):
        apply_policy(SPECS[1:2], parse_policy("triattention:20"))


@pytest.mark.parametrize("trigger", ["slack", "interval"])
@pytest.mark.parametrize(("budget", "interval"), [(20, 4), (7, 1), (5, 9), (12, 6)])
def test_entries_are_those_of_one_token_after_another(trigger, budget, interval):
    rounds, held = Rounds(budget, interval, trigger), 0
    for length in range(1, 80):
        held += 1
        if rounds.due(held, length - 1, length):
            held = budget
            assert length >= rounds.first()
        assert rounds.entries(length) == held
        assert held < budget + interval


def test_mean_length_of_a_long_run():
    """Figures of the paper's setting: 32768 tokens, a round every 128."""
    for budget, mean in ((512, 571), (1024, 1070.5), (2048, 2044.5), (3072, 2986.5), (4096, 3896.5)):
        rounds = Rounds(budget)
        assert sum(map(rounds.entries, range(1, 32769))) / 32768 == pytest.approx(mean, abs=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "union"}, "mode='union' is not known, use global, per_head, per_layer_per_head"),
        ({"aggregation": "sum"}, "aggregation='sum' is not known, use mean, max"),
        ({"group": "median"}, "group='median' is not known, use max, mean"),
        ({"trigger": "never"}, "trigger='never' is not known, use slack, interval"),
        ({"interval": 0}, "interval is 0, expected a whole number of at least 1"),
        ({"max_offset": 0}, "max_offset is 0"),
        ({"protect_recent": 64}, "64 recent and 0 first entries are protected"),
        ({"protect_recent": 60, "protect_sinks": 4}, "raise the budget"),
        ({"protect_sinks": -1}, "protect_sinks is -1"),
        ({"count_prompt": False, "protect_prompt": False}, "needs protect_prompt=True"),
        ({"size": 3}, "takes no option 'size'"),
        ({"bits": 3}, "takes no option 'bits', it knows: statistics, mode, interval"),
    ],
)
def test_options_of_a_budget(options, message):
    with pytest.raises(ValueError, match=message):
        parse_policy("triattention:64", options)


def test_a_budget_of_nothing_and_two_ways_to_keep():
    with pytest.raises(ValueError, match="size is 0"):
        parse_policy("triattention:0")
    with pytest.raises(ValueError, match="'triattention:9' clashes"):
        parse_policy("window:3+triattention:9")


def test_codes_are_for_what_grows():
    coded = apply_policy(SPECS, parse_policy("turboquant:k4v3", {"block": 16, "skip_layers": [2]}))
    assert [spec.codes is not None for spec in coded] == [True, False, False, True]
    assert coded[0].codes.k_bits == 4 and coded[0].codes.v_bits == 3 and coded[0].codes.block == 16
    assert coded[1:3] == SPECS[1:3]
    assert apply_policy(SPECS, parse_policy("turboquant:16")) == SPECS
    skipped = apply_policy(SPECS, parse_policy("turboquant:4", {"skip_layers": (0,)}))
    assert [spec.codes is not None for spec in skipped] == [
        False,
        False,
        True,
        False,
    ]  # a consumer reads its producer's


def test_bytes_of_codes():
    spec = apply_policy([AttentionSpec(2, 64)], parse_policy("turboquant:4", {"window": 10, "sink_tokens": 3}))[0]
    assert spec.nbytes(73, 2) == 73 * 2 * 2 * 64 * 2  # the first block is complete, but not yet 10 tokens old
    assert spec.nbytes(74, 2) == 2 * (61 * 2 * 34 + 13 * 2 * 64 * 2)
    tied = apply_policy([AttentionSpec(1, 512, value_only=True)], parse_policy("turboquant:3"))[0]
    assert tied.nbytes(128, 2) == 128 * 194
    split = apply_policy([AttentionSpec(2, 128)], parse_policy("turboquant:2.5"))[0]
    assert split.nbytes(64, 2) == 2 * (64 * 2 * 44 + 2 * 2 * 32)  # and the indices of 32 channels, once


@pytest.mark.parametrize(
    "kv", ["turboquant", "turboquant:", "turboquant:4.", "turboquant:k4", "turboquant:v4k4", "tq:4"]
)
def test_a_typo_in_codes(kv):
    with pytest.raises(ValueError, match="is not a memory policy"):
        parse_policy(kv)


@pytest.mark.parametrize(
    ("kv", "options", "what"),
    [
        ("turboquant:0", {}, "0 bits is not among"),
        ("turboquant:9", {}, "9 bits is not among"),
        ("turboquant:1.5", {}, "1.5 bits is not among"),
        ("turboquant:k16v4", {}, "both quantised or neither"),
        ("turboquant:4", {"block": 24}, "block is 24, use 1 or a multiple of 16"),
        ("turboquant:4", {"block": 0}, "block is 0"),
        ("turboquant:4", {"window": -1}, "window is -1"),
        ("turboquant:4", {"sink_tokens": 1.5}, "sink_tokens is 1.5"),
        ("turboquant:4", {"scale": "exact"}, "scale='exact' is not known, use unbiased"),
        ("turboquant:4", {"prefill": "chunk"}, "prefill='chunk'"),
        ("turboquant:4", {"scale_dtype": "bfloat16"}, "scale_dtype='bfloat16'"),
        ("turboquant:4", {"variant": "prod", "scale": "lsq"}, "clashes with variant='prod'"),
        ("turboquant:4", {"bits": 3}, "takes no option 'bits', it knows: scale, rotation, window"),
        ("turboquant:4+turboquant:3", {}, "'turboquant:3' clashes"),
        ("window:9+turboquant:3", {}, "a window leaves nothing that grows"),
        ("triattention:64+turboquant:3", {"window": 8}, "window=8 .* protect_recent=0 lets go"),
        ("triattention:64+turboquant:3", {"sink_tokens": 2}, "set protect_sinks=2"),
    ],
)
def test_codes_that_are_not_defined(kv, options, what):
    with pytest.raises(ValueError, match=what):
        parse_policy(kv, options)


def test_int8_is_codes_of_eight_bits():
    assert parse_policy("int8").store == parse_policy("turboquant:8").store
    assert policy_options("int8") == policy_options("turboquant:8")


COMPRESSED = [
    CompressedSpec(512, 64, window=128),
    CompressedSpec(512, 64, window=128, ratio=4, is_overlapping=True, index=Indexer(64, 128, 512)),
    CompressedSpec(512, 64, window=128, ratio=128),
]


def test_a_release_that_keeps_entries_in_its_own_way():
    policy = parse_policy("released")
    assert str(policy) == "released"
    dense, released = (apply_policy(COMPRESSED, parse_policy(kv)) for kv in ("dense", "released"))
    assert dense == COMPRESSED
    assert apply_policy(released, parse_policy("dense")) == dense
    assert [(spec.entry_nbytes(2), spec.key_nbytes(2)) for spec in dense] == [(1024, 0), (1024, 256), (1024, 0)]
    assert [(spec.entry_nbytes(2), spec.key_nbytes(2)) for spec in released] == [(584, 0), (584, 68), (584, 0)]
    assert settled(policy, COMPRESSED) == policy
    assert same_policy(settled(policy, SPECS), parse_policy("dense"))  # elsewhere there is no difference
    assert apply_policy(SPECS, policy) == SPECS


def test_bytes_of_compressed_entries():
    """A window of single tokens, an entry for each complete window of `ratio`, and what compressors hold meanwhile."""
    sliding, sparse, heavy = apply_policy(COMPRESSED, parse_policy("released"))
    assert [spec.nbytes(0, 2) for spec in (sliding, sparse, heavy)] == [0, 2 * 3 * 4 * (512 + 128), 3 * 4 * 512]
    for tokens in (1, 3, 4, 127, 128, 129, 5000):
        window = min(tokens, 128) * 584
        assert sliding.nbytes(tokens, 2) == window
        assert sparse.nbytes(tokens, 2) == window + tokens // 4 * (584 + 68) + sparse.state_nbytes
        assert heavy.nbytes(tokens, 2) == window + tokens // 128 * 584 + heavy.state_nbytes
    assert [sparse.read_entries(tokens) for tokens in (3, 4, 2047, 2048, 9999)] == [0, 1, 511, 512, 512]
    assert not any(spec.depends_on_cuts for spec in COMPRESSED)


@pytest.mark.parametrize("kv", ["window:9", "triattention:9", "turboquant:4", "int8", "triattention:9+turboquant:4"])
def test_policies_of_single_tokens_are_refused_where_entries_stand_for_several(kv):
    named = kv.replace("int8", "turboquant:8")
    with pytest.raises(ValueError, match=f"{re.escape(named)} is defined for keys and values of single tokens: use"):
        apply_policy(COMPRESSED, parse_policy(kv))


def test_sizes_that_a_release_has_no_bytes_for():
    for spec, message in (
        (replace(COMPRESSED[1], index=Indexer(4, 16, 3)), "a key of 16 numbers has no FP4 form: use a power of two"),
        (replace(COMPRESSED[1], index=Indexer(4, 96, 3)), "a key of 96 numbers has no FP4 form"),
        (replace(COMPRESSED[0], rope_dim=512), "an entry of 512 numbers cannot have 512 that turn"),
    ):
        with pytest.raises(ValueError, match=f"^kv='released': {message}.*, or kv='dense'$"):
            apply_policy([COMPRESSED[2], spec], parse_policy("released"))
