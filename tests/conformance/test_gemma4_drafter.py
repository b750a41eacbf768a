"""Gemma 4 drafters: one draft against transformers' module (unblocked) and the definition in float64; whole answers."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    Gemma4AssistantConfig,
    Gemma4AssistantForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    Gemma4UnifiedAssistantConfig,
    Gemma4UnifiedAssistantForCausalLM,
    Gemma4UnifiedForCausalLM,
    Gemma4UnifiedTextConfig,
)

import sparing
from sparing.decoding.drafters import GemmaDrafter
from sparing.decoding.drafting import DraftRow
from sparing.decoding.sampling import Sampling
from sparing.errors import CheckpointError
from sparing.inspection import inspect
from sparing.models.batch import Row
from sparing.models.gemma4_drafter import Gemma4Drafter, clustered_logits
from tests.conformance.reference import assert_same, load, rewrite, save_random
from tests.tiny import EXPERTS, FULL, KEYS_ARE_VALUES, SIZES, SLIDING, WINDOW, random_ids

s, f = SLIDING, FULL
VOCAB, BACKBONE = 96, 48
COMMON = SIZES | {"vocab_size": VOCAB, "head_dim": 8, "global_head_dim": 16, "sliding_window": WINDOW}
TARGET = COMMON | {
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size": BACKBONE,
    "final_logit_softcapping": 30.0,
}
DRAFTER = COMMON | {
    "vocab_size_per_layer_input": 0,
    "num_hidden_layers": 4,
    "layer_types": [s, s, s, f],
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 4,
}
# What tells the five sizes apart: sharing and a clustered head (E2B, E4B); K = V (12B, 26B-A4B, 31B); experts (26B).
SIZES = {
    "E-series": (
        {
            "num_hidden_layers": 7,
            "layer_types": [s, s, f, s, s, s, f],
            "hidden_size_per_layer_input": 6,
            "num_kv_shared_layers": 3,
        },
        {},
        {"use_ordered_embeddings": True, "num_centroids": 12, "centroid_intermediate_top_k": 3},
    ),
    "unified": ({"num_hidden_layers": 4, "layer_types": [s, f, s, f], **KEYS_ARE_VALUES}, KEYS_ARE_VALUES, {}),
    "mixture": (
        {
            "num_hidden_layers": 3,
            "layer_types": [s, s, f],
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            **EXPERTS,
            **KEYS_ARE_VALUES,
        },
        KEYS_ARE_VALUES,
        {},
    ),
    "dense": (
        {"num_hidden_layers": 2, "layer_types": [s, f], "hidden_size_per_layer_input": 0, **KEYS_ARE_VALUES},
        KEYS_ARE_VALUES,
        {},
    ),
}


@pytest.fixture(autouse=True)
def _unblocked(monkeypatch):
    """The reference refuses a stack of nothing but consumers; it works once the check is out of the way."""
    for config_class in (Gemma4TextConfig, Gemma4UnifiedTextConfig):
        modes = config_class.kv_sharing_modes.fget

        def unchecked(config, modes=modes):
            everyone = config.num_kv_shared_layers == config.num_hidden_layers
            return ["reuse"] * config.num_hidden_layers if everyone else modes(config)

        monkeypatch.setattr(config_class, "kv_sharing_modes", property(unchecked))


def pair(size, folder):
    """(our target, our drafter, the reference drafter), all from files."""
    target, text, outer = SIZES[size]
    if size == "unified":
        no_lookup = {k: v for k, v in (TARGET | target).items() if k != "vocab_size_per_layer_input"}
        save_random(Gemma4UnifiedForCausalLM, Gemma4UnifiedTextConfig(**no_lookup), folder / "target")
        drop = ("vocab_size_per_layer_input", "hidden_size_per_layer_input")
        inner = Gemma4UnifiedTextConfig(**{k: v for k, v in (DRAFTER | text).items() if k not in drop})
        config = Gemma4UnifiedAssistantConfig(text_config=inner, backbone_hidden_size=BACKBONE, **outer)
        reference_class = Gemma4UnifiedAssistantForCausalLM
    else:
        save_random(Gemma4ForCausalLM, Gemma4TextConfig(**(TARGET | target)), folder / "target")
        inner = Gemma4TextConfig(**(DRAFTER | text))
        config = Gemma4AssistantConfig(text_config=inner, backbone_hidden_size=BACKBONE, **outer)
        reference_class = Gemma4AssistantForCausalLM
    inner._attn_implementation = "eager"
    torch.manual_seed(0)
    reference = save_random(reference_class, config, folder / "drafter", seed=1)
    if reference.masked_embedding is not None:  # written as zeros: an order of our own
        order = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(3))
        rewrite(folder / "drafter", tensors=lambda t: t | {"masked_embedding.token_ordering": order})
        reference.masked_embedding.token_ordering.copy_(order)
    return load(folder / "target"), load(folder / "drafter"), reference


@pytest.fixture(params=SIZES)
def size(request):
    return request.param


@pytest.fixture
def models(size, tmp_path):
    return pair(size, tmp_path)


def entries(target, memory, sliding):
    """Keys and values handed over, per layer kind: [kv_heads, n, d]; `sliding`: how many of the window's."""
    found = {}
    for kind, index in target.config.last_producers.items():
        layer = memory.layers[index]
        k, v = layer.read()
        found[kind] = (k, v) if kind == FULL else (k[:, -sliding:], v[:, -sliding:])
    return found


def prepared(target, drafter, length):
    """A memory of `length` tokens filled as the engine fills it, the newest token, and the state before it."""
    tokens = random_ids(length + 1, vocab_size=VOCAB, seed=length)
    memory = target.memory()
    GemmaDrafter(drafter, target).open(SimpleNamespace(memory=memory))  # type: ignore[arg-type]
    for chunk in tokens[:-1].split(4):
        target.logits(chunk, memory)
    hidden = target.run([Row(tokens[:-1], target.memory())])[-1:]
    return memory, tokens[-1:], hidden


@pytest.mark.parametrize("length", [1, 3, WINDOW - 1, WINDOW, WINDOW + 1, WINDOW + 2, 17])
def test_one_draft_is_that_of_the_reference(models, length):
    target, drafter, reference = models
    memory, newest, hidden = prepared(target, drafter, length)
    embedded = target.model.embed_tokens(newest)
    handed = entries(target, memory, WINDOW + 1)
    assert handed[FULL][0].shape[1] == length
    assert handed[SLIDING][0].shape[1] == min(length, WINDOW + 1)
    shared = {kind: (k[None], v[None]) for kind, (k, v) in handed.items()}
    logits, state = drafter.draft(newest, embedded, hidden, [memory], drafter.sources(target.config))
    with torch.no_grad():
        theirs = reference(
            inputs_embeds=torch.cat([embedded, hidden], -1)[None],
            position_ids=torch.tensor([[length]]),
            shared_kv_states=shared,
        )
    assert_same(logits, theirs.logits[0], 5e-5)
    assert_same(state, theirs.last_hidden_state[0], 5e-5)
    assert memory.staged == 0 and memory.length == length


def literal(target, drafter, memory, newest, hidden, position):
    """One draft by the formulas, in float64: (logits [V], state [backbone])."""
    w = {name: tensor.double() for name, tensor in drafter.state_dict().items()}
    config = drafter.config
    handed = entries(target, memory, WINDOW + 1)

    def rms(x, weight):
        return x * (x.pow(2).mean(-1, keepdim=True) + config.text.rms_norm_eps) ** -0.5 * weight

    def gelu(x):
        return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))

    def rotate(q, kind):
        d = q.shape[-1]
        rotating = d // 2 if kind == SLIDING else int(0.25 * d // 2)
        theta = 1e4 if kind == SLIDING else 1e6
        out = q.clone()
        for m in range(rotating):
            angle = torch.tensor(position * theta ** (-2 * m / d), dtype=torch.float64)
            a, b = q[..., m], q[..., m + d // 2]
            out[..., m] = a * angle.cos() - b * angle.sin()
            out[..., m + d // 2] = b * angle.cos() + a * angle.sin()
        return out

    embedding = target.model.embed_tokens.weight[newest].double() * BACKBONE**0.5
    x = w["pre_projection.weight"] @ torch.cat([embedding[0], hidden[0].double()])
    for i, layer in enumerate(config.layers):
        p = f"model.layers.{i}."
        q = (w[p + "self_attn.q_proj.weight"] @ rms(x, w[p + "input_layernorm.weight"])).view(4, layer.head_dim)
        q = rotate(rms(q, w[p + "self_attn.q_norm.weight"]), layer.kind)
        k, v = (t.double() for t in handed[layer.kind])
        group = 4 // len(k)
        heads = [torch.softmax(k[n // group] @ q[n], -1) @ v[n // group] for n in range(4)]
        x = x + rms(w[p + "self_attn.o_proj.weight"] @ torch.cat(heads), w[p + "post_attention_layernorm.weight"])
        h = rms(x, w[p + "pre_feedforward_layernorm.weight"])
        h = gelu(w[p + "mlp.gate_proj.weight"] @ h) * (w[p + "mlp.up_proj.weight"] @ h)
        x = x + rms(w[p + "mlp.down_proj.weight"] @ h, w[p + "post_feedforward_layernorm.weight"])
        x = x * w[p + "layer_scalar"]
    x = rms(x, w["model.norm.weight"])
    table = w["model.embed_tokens.weight"]
    logits = table @ x
    if config.num_centroids:
        order = drafter.masked_embedding.token_ordering.tolist()
        scores = w["masked_embedding.centroids.weight"] @ x
        size = VOCAB // config.num_centroids
        best = sorted(range(config.num_centroids), key=lambda c: -scores[c])[: config.centroid_intermediate_top_k]
        scored = [order[c * size + j] for c in best for j in range(size)]
        rest = logits[scored].min() - 1
        logits = torch.stack([logits[t] if t in scored else rest for t in range(VOCAB)])
    return logits, w["post_projection.weight"] @ x


def test_a_chain_of_drafts_is_the_definition(models):
    """Three drafts from one position and the same entries, each from the token and state of the one before."""
    target, drafter, _ = models
    memory, newest, hidden = prepared(target, drafter, 11)
    sequence = SimpleNamespace(memory=memory, pending=newest, generator=None)
    row = DraftRow(sequence, newest.tolist(), None, hidden)  # type: ignore[arg-type]
    proposal = GemmaDrafter(drafter, target).propose([row], [3], Sampling())[0]
    assert proposal.probabilities is None
    token, state = newest, hidden
    for draft in proposal.ids.tolist():
        logits, next_state = literal(target, drafter, memory, token, state, 11)
        embedded = target.model.embed_tokens(token)
        ours, our_state = drafter.draft(token, embedded, state.float(), [memory], drafter.sources(target.config))
        assert_same(ours[0], logits, 5e-5)
        assert_same(our_state[0], next_state, 5e-5)
        assert int(logits.argmax()) == draft
        token, state = torch.tensor([draft]), next_state[None]
    assert len(proposal.ids) == 3


PROMPTS = [random_ids(n, vocab_size=VOCAB, seed=n).tolist() for n in (2, 9, 20)]


def answers(model, prompts=PROMPTS, **options):
    events = list(sparing.generate(model, prompts, **({"max_new_tokens": 24} | options)))
    rows = range(len(prompts))
    found = [[t for e in events if isinstance(e, sparing.Commit) and e.row == i for t in e.ids] for i in rows]
    stats = {e.row: e.stats for e in events if isinstance(e, sparing.Done)}
    return found, [stats[i] for i in rows]


@pytest.mark.parametrize("kv", ["dense", "window:4"])
def test_greedy_answers_are_those_of_plain_decoding(models, kv, monkeypatch):
    target, drafter, _ = models
    monkeypatch.setitem(target.generation_config, "eos_token_id", [])
    plain, _ = answers(target, temperature=0, kv=kv)
    drafted, stats = answers(target, temperature=0, kv=kv, draft=drafter, adaptive=False)
    assert drafted == plain
    assert all(row["proposed"] >= row["rounds"] for row in stats)
    sampled, _ = answers(target, temperature=0.8, seed=3, kv=kv, draft=drafter, adaptive=False)
    assert sampled[0] == answers(target, temperature=0.8, seed=3, kv=kv, draft=drafter, adaptive=False)[0][0]


POLICIES = {
    "codes": ("turboquant:4", {"block": 1}),
    "codes of blocks": ("turboquant:k3v2", {"block": 16, "sink_tokens": 2}),
    "budget": ("triattention:12", {"interval": 3, "mode": "global", "protect_prompt": False}),
    "budget of codes": ("triattention:12+turboquant:4", {"interval": 3, "block": 1, "protect_prompt": False}),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_greedy_answers_over_what_a_policy_keeps(models, policy, monkeypatch):
    """Those of plain decoding; of a budget, whose rounds fall between commits, of plain passes in the same portions."""
    target, drafter, _ = models
    monkeypatch.setitem(target.generation_config, "eos_token_id", [])
    kv, options = POLICIES[policy]
    if "triattention" in kv:
        options = options | {"statistics": sparing.calibrate(target, random_ids(120, vocab_size=VOCAB))}
    settings = options | {"kv": kv, "temperature": 0, "max_new_tokens": 24}
    drafting = settings | {"draft": drafter, "adaptive": False}
    if "triattention" not in kv:
        assert answers(target, **drafting)[0] == answers(target, **settings)[0]
        return
    for prompt in PROMPTS:
        memory, known = target.memory(kv, **options), prompt
        for event in sparing.generate(target, prompt, **drafting):
            if isinstance(event, sparing.Commit):
                logits = target.logits([*known, *event.ids[:-1]], memory)
                assert logits[-len(event.ids) :].argmax(-1).tolist() == event.ids
                known = event.ids[-1:]
        assert event.stats["proposed"] >= event.stats["rounds"]
        assert event.stats["evictions"] == memory.evictions != []


def test_what_is_handed_over_never_holds_rejected_tokens(models, monkeypatch):
    """Whatever was rejected before, each draft is that of a memory filled with the output alone."""
    target, drafter, _ = models
    monkeypatch.setitem(target.generation_config, "eos_token_id", [])
    propose = GemmaDrafter.propose
    checked = 0

    def checking(self, rows, counts, sampling):
        nonlocal checked
        found = propose(self, rows, counts, sampling)
        for row, count, proposal in zip(rows, counts, found, strict=True):
            memory = target.memory()
            self.open(SimpleNamespace(memory=memory))
            hidden = None
            for token in row.history[:-1]:
                hidden = target.run([Row(torch.tensor([token]), memory)])
                memory.commit(1)
            sequence = SimpleNamespace(memory=memory, pending=row.sequence.pending, generator=None)
            fresh = propose(self, [DraftRow(sequence, row.history, None, hidden)], [count], sampling)[0]
            assert torch.equal(fresh.ids, proposal.ids)
            checked += count > 0
        return found

    monkeypatch.setattr(GemmaDrafter, "propose", checking)
    _, stats = answers(target, PROMPTS[:2], temperature=0, draft=drafter, adaptive=False, max_new_tokens=10)
    assert checked > 6
    assert any(row["accepted"] < row["proposed"] for row in stats)


def test_clustered_logits():
    generator = torch.Generator().manual_seed(0)
    table, centroids = torch.randn(12, 6, generator=generator), torch.randn(4, 6, generator=generator)
    ordering, x = torch.randperm(12, generator=generator), torch.randn(5, 6, generator=generator)
    assert_same(clustered_logits(x, table, centroids, ordering, 4), x @ table.T, 1e-5)  # all clusters: a plain head
    few = clustered_logits(x, table, centroids, ordering, 1)
    for row, hidden in zip(few, x, strict=True):
        cluster = int((centroids @ hidden).argmax())
        scored = ordering.view(4, 3)[cluster]
        assert_same(row[scored], table[scored] @ hidden, 1e-5)
        others = [t for t in range(12) if t not in scored]
        assert torch.allclose(row[others], row[scored].min() - 1)
    assert torch.equal(clustered_logits(x[2:3], table, centroids, ordering, 1), few[2:3])


# --- files and refusals ---


def test_a_drafter_alone_says_what_it_is_for(models):
    _, drafter, _ = models
    assert isinstance(drafter, Gemma4Drafter)
    for use in (lambda: drafter.logits([1, 2]), lambda: sparing.generate(drafter, [1, 2])):
        with pytest.raises(ValueError, match="is a drafter"):
            use()


def test_a_drafter_of_another_model_is_refused(tmp_path):
    target, drafter, _ = pair("dense", tmp_path / "a")
    other, _, _ = pair("E-series", tmp_path / "b")
    with pytest.raises(ValueError, match="kv heads"):
        sparing.generate(other, [1, 2], draft=drafter)
    rewrite(tmp_path / "a" / "drafter", config=lambda c: c.update(backbone_hidden_size=64), tensors=widened)
    with pytest.raises(ValueError, match="backbone_hidden_size is 64, the model's is 48"):
        sparing.generate(target, [1, 2], draft=load(tmp_path / "a" / "drafter"))


def widened(tensors):
    return tensors | {"pre_projection.weight": torch.randn(32, 128), "post_projection.weight": torch.randn(64, 32)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_shared_layers": 3}, "num_kv_shared_layers is 3: all 4 layers of a drafter share"),
        ({"hidden_size_per_layer_input": 8}, "hidden_size_per_layer_input is 8"),
        ({"enable_moe_block": True}, "enable_moe_block is True"),
        ({"use_double_wide_mlp": True}, "use_double_wide_mlp is True"),
    ],
)
def test_configs_that_are_not_a_drafters(change, message, tmp_path):
    pair("dense", tmp_path)
    rewrite(tmp_path / "drafter", config=lambda c: c["text_config"].update(change))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "drafter")


def test_spellings_of_a_config(tmp_path):
    target, drafter, _ = pair("E-series", tmp_path)
    folder = tmp_path / "drafter"
    plain, _ = answers(target, temperature=0, draft=drafter, adaptive=False)

    def missing(config):
        for key in ("num_kv_shared_layers", "hidden_size_per_layer_input", "vocab_size_per_layer_input"):
            config["text_config"].pop(key, None)

    rewrite(folder, config=missing)
    assert answers(target, temperature=0, draft=load(folder), adaptive=False)[0] == plain
    for key, value, message in (
        ("num_centroids", 7, "vocab_size 96 is not a multiple of num_centroids 7"),
        ("centroid_intermediate_top_k", 13, "there are only 12 centroids"),
    ):
        raw = json.loads((folder / "config.json").read_text())
        rewrite(folder, config=lambda c, key=key, value=value: c.update({key: value}))
        with pytest.raises(CheckpointError, match=message):
            load(folder)
        (folder / "config.json").write_text(json.dumps(raw))


def test_an_order_that_names_no_token_is_refused(tmp_path):
    target, _, _ = pair("E-series", tmp_path)
    broken = torch.arange(VOCAB) + 1
    rewrite(tmp_path / "drafter", tensors=lambda t: t | {"masked_embedding.token_ordering": broken})
    with pytest.raises(ValueError, match="token_ordering"):
        sparing.generate(target, [1, 2], draft=load(tmp_path / "drafter"))


def test_a_drafter_can_be_planned_and_inspected(tmp_path):
    """It holds no entries of its own; the order of its tokens is no parameter."""
    _, drafter, _ = pair("E-series", tmp_path)
    parameters = sum(p.numel() for p in drafter.parameters())
    plan = sparing.plan(tmp_path / "drafter", context=100).to_dict()
    assert (plan["memory_bytes"], plan["parameters"]) == (0, parameters)
    found = inspect(tmp_path / "drafter")
    assert found.parameters == parameters
    assert not found.problems
