"""Nemotron 3's drafting head, which transformers ignores: the definition in float64, and answers of plain decoding."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers import NemotronHConfig, NemotronHForCausalLM

import sparing
from sparing.config.formats import is_packed
from sparing.decoding import drafters, engine
from sparing.decoding.drafters import MTPDrafter
from sparing.decoding.drafting import DraftRow, weight_bytes
from sparing.decoding.sampling import Sampling
from sparing.errors import CheckpointError
from sparing.models.batch import Row
from sparing.models.loading import load_drafting_head
from sparing.models.nemotron3_mtp import mtp_draft
from sparing.weights.integer import Int8Weight
from sparing.weights.weight import PackedWeight
from tests.conformance.reference import assert_same, load, rewrite, save_random
from tests.conformance.test_nemotron3 import TINY as HYBRID
from tests.tiny import VOCAB, hybrid_scale, random_ids
from tests.tiny import model as without_file

TINY = HYBRID | {"eos_token_id": None}
H, DENSE = TINY["hidden_size"], TINY["intermediate_size"]
HEADS, KV, D = TINY["num_attention_heads"], TINY["num_key_value_heads"], TINY["head_dim"]
EXPERTS, WIDTH = TINY["n_routed_experts"], TINY["moe_intermediate_size"]
SHARED, LATENT = TINY["moe_shared_expert_intermediate_size"], TINY["moe_latent_size"]
MAMBA_HEADS, MAMBA_DIM, STATE = TINY["mamba_num_heads"], TINY["mamba_head_dim"], TINY["ssm_state_size"]
GROUPS, KERNEL = TINY["n_groups"], TINY["conv_kernel"]
INNER = MAMBA_HEADS * MAMBA_DIM
CONV = INNER + 2 * GROUPS * STATE


KINDS = {"M": "linear_attention", "*": "full_attention", "E": "moe", "-": "mlp"}  # as transformers writes them


def mixer_shapes(kind):
    """Tensors of one mixer in the layout of the hub: experts one by one."""
    if kind == "M":
        return {
            "in_proj.weight": (INNER + CONV + MAMBA_HEADS, H),
            "conv1d.weight": (CONV, 1, KERNEL),
            "conv1d.bias": (CONV,),
            "dt_bias": (MAMBA_HEADS,),
            "A_log": (MAMBA_HEADS,),
            "D": (MAMBA_HEADS,),
            "norm.weight": (INNER,),
            "out_proj.weight": (H, INNER),
        }
    if kind == "*":
        kv = (KV * D, H)
        shapes = {"q_proj": (HEADS * D, H), "k_proj": kv, "v_proj": kv, "o_proj": (H, HEADS * D)}
        return {f"{name}.weight": shape for name, shape in shapes.items()}
    if kind == "-":
        return {"up_proj.weight": (DENSE, H), "down_proj.weight": (H, DENSE)}
    shapes = {
        "gate.weight": (EXPERTS, H),
        "gate.e_score_correction_bias": (EXPERTS,),
        "shared_experts.up_proj.weight": (SHARED, H),
        "shared_experts.down_proj.weight": (H, SHARED),
        "fc1_latent_proj.weight": (LATENT, H),
        "fc2_latent_proj.weight": (H, LATENT),
    }
    for e in range(EXPERTS):
        shapes[f"experts.{e}.up_proj.weight"] = (WIDTH, LATENT)
        shapes[f"experts.{e}.down_proj.weight"] = (LATENT, WIDTH)
    return shapes


def head_tensors(pattern="*E"):
    """A head of these mixers."""
    shapes = {"0.enorm.weight": (H,), "0.hnorm.weight": (H,), "0.eh_proj.weight": (H, 2 * H)}
    for i, kind in enumerate(pattern):
        shapes[f"{i}.norm.weight"] = (H,)
        shapes |= {f"{i}.mixer.{name}": shape for name, shape in mixer_shapes(kind).items()}
    shapes[f"{len(pattern) - 1}.final_layernorm.weight"] = (H,)
    generator = torch.Generator().manual_seed(9)
    named = {f"mtp.layers.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: hybrid_scale(name, tensor, tensor) for name, tensor in named.items()}


def save(folder, head="*E", **settings):
    save_random(NemotronHForCausalLM, NemotronHConfig(**(TINY | settings)), folder, seed=1, scale=hybrid_scale)
    words = [KINDS[letter] for letter in head]
    rewrite(
        folder,
        config=lambda c: c.update(num_nextn_predict_layers=1, mtp_layers_block_type=words),
        tensors=lambda tensors: tensors | head_tensors(head),
    )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("mtp"))


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


def states_of(model, tokens):
    """The target's final-normed states at all positions: [T, H]."""
    memory = model.memory()
    return model.run([Row(torch.as_tensor(tokens), memory)])


def rms(x, weight):
    return x * (x.pow(2).mean(-1, keepdim=True) + 1e-5) ** -0.5 * weight


def mlp(x, up, down):
    return torch.relu(x @ up.T).pow(2) @ down.T


def attention(h, w):
    q, k, v = ((h @ w[f"{name}_proj.weight"].T).view(len(h), -1, D).transpose(0, 1) for name in ("q", "k", "v"))
    hidden = torch.ones(len(h), len(h), dtype=torch.bool).triu(1)
    heads = []
    for n in range(HEADS):
        scores = (q[n] @ k[n // (HEADS // KV)].T / D**0.5).masked_fill(hidden, float("-inf"))
        heads.append(scores.softmax(-1) @ v[n // (HEADS // KV)])
    return torch.cat(heads, -1) @ w["o_proj.weight"].T


def mixture(h, w):
    rows = []
    for row in h:
        s = torch.sigmoid(w["gate.weight"] @ row)
        b = s + w["gate.e_score_correction_bias"]
        best = b.view(4, 2).sum(-1).topk(2).indices.tolist()  # two experts a group: its score is their sum
        allowed = [e for e in range(EXPERTS) if e // 2 in best]
        chosen = sorted(allowed, key=lambda e: -b[e])[:3]
        weights = s[chosen] / s[chosen].sum() * 2.5
        latent = w["fc1_latent_proj.weight"] @ row
        mixed = sum(
            weight * mlp(latent, w[f"experts.{e}.up_proj.weight"], w[f"experts.{e}.down_proj.weight"])
            for e, weight in zip(chosen, weights, strict=True)
        )
        shared = mlp(row, w["shared_experts.up_proj.weight"], w["shared_experts.down_proj.weight"])
        rows.append(w["fc2_latent_proj.weight"] @ mixed + shared)
    return torch.stack(rows)


def mamba(h, w):
    z, xbc, raw = (h @ w["in_proj.weight"].T).split([INNER, CONV, MAMBA_HEADS], -1)
    before = torch.cat([xbc.new_zeros(KERNEL - 1, CONV), xbc])
    taps = w["conv1d.weight"][:, 0]
    dt = F.softplus(raw + w["dt_bias"])
    state = torch.zeros(MAMBA_HEADS, MAMBA_DIM, STATE, dtype=h.dtype)
    rows = []
    for t in range(len(h)):
        mixed = F.silu(w["conv1d.bias"] + sum(taps[:, j] * before[t + j] for j in range(KERNEL)))
        x, b, c = mixed.split([INNER, GROUPS * STATE, GROUPS * STATE])
        x, b, c = x.view(MAMBA_HEADS, MAMBA_DIM), b.view(GROUPS, STATE), c.view(GROUPS, STATE)
        y = torch.empty_like(x)
        for i in range(MAMBA_HEADS):
            g = i // (MAMBA_HEADS // GROUPS)
            state[i] = (-dt[t, i] * w["A_log"][i].exp()).exp() * state[i] + dt[t, i] * torch.outer(x[i], b[g])
            y[i] = state[i] @ c[g] + w["D"][i] * x[i]
        gated = (y.flatten() * F.silu(z[t])).view(GROUPS, -1)
        rows.append(rms(gated, 1.0).flatten() * w["norm.weight"])
    return torch.stack(rows) @ w["out_proj.weight"].T


MIXERS = {
    "M": mamba,
    "*": attention,
    "E": mixture,
    "-": lambda h, w: mlp(h, w["up_proj.weight"], w["down_proj.weight"]),
}


def literal(model, tokens, states, pattern="*E"):
    """The head by its formulas in float64: (logits [n, V], states [n, H]) of entries of tokens [n], states [n, H]."""
    w = {name.removeprefix("mtp.layers."): tensor.double() for name, tensor in head_tensors(pattern).items()}
    embedded = model.backbone.embeddings.weight[tokens].double()
    pair = [rms(embedded, w["0.enorm.weight"]), rms(states.double(), w["0.hnorm.weight"])]
    x = torch.cat(pair, -1) @ w["0.eh_proj.weight"].T
    for i, kind in enumerate(pattern):
        own = {name.removeprefix(f"{i}.mixer."): tensor for name, tensor in w.items() if name.startswith(f"{i}.mixer.")}
        x = x + MIXERS[kind](rms(x, w[f"{i}.norm.weight"]), own)
    g = rms(x, w[f"{len(pattern) - 1}.final_layernorm.weight"])
    return g @ model.lm_head.weight.double().T, g


def check_drafts(model, head="*E"):
    """Entry i takes token i + 1 and the state at i; the head's own output stands in for states not computed yet."""
    pattern, tokens = head, random_ids(12)
    states = states_of(model, tokens[:-1])
    head = load_drafting_head(model)
    kv = head.memory()
    known = mtp_draft(head, tokens[1:6], states[:5], kv, 1)  # entries in two portions
    assert kv.length == 5 and len(known[0]) == 1
    drafts, logits = mtp_draft(head, tokens[6:], states[5:], kv, 4)
    assert kv.length == 11 and kv.staged == 0
    entered, handed = tokens[1:], states
    for draft, row in zip(drafts, logits, strict=True):
        expected, g = literal(model, entered, handed, pattern)
        assert_same(row, expected[-1], 2e-4)
        assert int(expected[-1].argmax()) == draft
        entered, handed = torch.cat([entered, draft[None]]), torch.cat([handed.double(), g[-1:]])


def test_drafts_are_the_definition(model):
    check_drafts(model)


@pytest.mark.parametrize(("target", "head"), [("M-M*-", "*E"), ("ME*E", "*-"), ("*E*E", "ME"), ("*-", "E-M*")])
def test_a_head_of_mixers_that_the_target_lacks(target, head, tmp_path):
    """Mixers that only the head has are described by the same numbers of the config."""
    model = load(save(tmp_path, head, hybrid_override_pattern=target))
    check_drafts(model, head)
    plain, _ = answers(model, PROMPTS[2:])
    assert answers(model, PROMPTS[2:], draft="mtp", adaptive=False)[0] == plain


def test_depth_0_changes_nothing(model):
    head = load_drafting_head(model)
    kv = head.memory()
    drafts, logits = mtp_draft(head, random_ids(3), torch.randn(3, H), kv, 0)
    assert len(drafts) == 0 and logits.shape == (0, VOCAB) and kv.length == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": -1}, "depth is -1"),
        ({"depth": 1.0}, "depth is 1.0"),
        ({"token": 5}, r"token is 5: give an int64 tensor \[k\]"),
        ({"token": torch.tensor(5)}, r"token is torch.int64 \[\]"),
        ({"token": torch.tensor([0.5, 1.0])}, r"token is torch.float32 \[2\]"),
        ({"token": torch.tensor([5, VOCAB])}, f"token id {VOCAB} is out of range"),
        ({"token": torch.tensor([-1, 3])}, "token id -1 is out of range"),
        ({"hidden": torch.randn(3, H)}, rf"hidden has shape \[3, {H}\]: 2 tokens take \[2, {H}\]"),
        ({"hidden": torch.randn(2, H + 1)}, "hidden has shape"),
    ],
)
def test_drafts_of_what_does_not_fit_are_refused(model, change, message):
    head = load_drafting_head(model)
    given = {"token": random_ids(2), "hidden": torch.randn(2, H), "kv": head.memory(), "depth": 1}
    with pytest.raises(ValueError, match=message):
        mtp_draft(head, **(given | change))
    assert given["kv"].length == given["kv"].staged == 0


PROMPTS = [random_ids(n, seed=n).tolist() for n in (1, 2, 9, 20)]


def answers(model, prompts=PROMPTS, **options):
    events = list(sparing.generate(model, prompts, **({"max_new_tokens": 24, "temperature": 0} | options)))
    rows = range(len(prompts))
    found = [[t for e in events if isinstance(e, sparing.Commit) and e.row == i for t in e.ids] for i in rows]
    stats = {e.row: e.stats for e in events if isinstance(e, sparing.Done)}
    return found, [stats[i] for i in rows]


@pytest.mark.parametrize("kv", ["dense", "window:6"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_greedy_answers_are_those_of_plain_decoding(model, kv, adaptive):
    plain, _ = answers(model, kv=kv)
    drafted, stats = answers(model, kv=kv, draft="mtp", adaptive=adaptive)
    assert drafted == plain
    if not adaptive:
        assert all(row["proposed"] >= row["rounds"] for row in stats)
        assert sum(row["accepted"] for row in stats) < sum(row["proposed"] for row in stats)


@pytest.mark.parametrize("pattern", ["*MM-E", "MEM*", "E*ME"])
def test_other_targets(pattern, tmp_path):
    target = load(save(tmp_path, hybrid_override_pattern=pattern))
    plain, _ = answers(target, PROMPTS[2:])
    assert answers(target, PROMPTS[2:], draft="mtp", adaptive=False, draft_tokens=2)[0] == plain


def test_entries_are_made_of_true_states_however_much_was_rejected(model, monkeypatch):
    """Each round's drafts are those of a head that starts afresh from the whole row's true states."""
    head, propose, checked = load_drafting_head(model), MTPDrafter.propose, 0

    def checking(self, rows, counts, sampling):
        nonlocal checked
        found = propose(self, rows, counts, sampling)
        for row, count, proposal in zip(rows, counts, found, strict=True):
            if count:
                states = states_of(model, row.history[:-1])
                fresh, _ = mtp_draft(head, torch.tensor(row.history[1:]), states, head.memory(), count)
                assert torch.equal(fresh, proposal.ids)
                assert row.state.length == len(row.history) - 1
                checked += 1
        return found

    monkeypatch.setattr(MTPDrafter, "propose", checking)
    _, stats = answers(model, draft="mtp", adaptive=False)
    assert checked > 20
    assert any(row["accepted"] < row["proposed"] for row in stats)


def test_long_prompts_in_chunks(model, monkeypatch):
    plain, _ = answers(model)
    monkeypatch.setattr(engine, "PIECE", 7)
    monkeypatch.setattr(drafters, "PIECE", 5)
    drafted, stats = answers(model, draft="mtp", adaptive=False)
    assert drafted == plain
    monkeypatch.undo()
    whole, expected = answers(model, draft="mtp", adaptive=False)
    assert whole == drafted
    assert [(row["proposed"], row["accepted"]) for row in stats] == [(r["proposed"], r["accepted"]) for r in expected]


def test_a_memory_continues(model):
    memories = [model.memory(), model.memory()]
    prompt, more = PROMPTS[3], PROMPTS[2]
    for memory in memories:
        model.logits(prompt, memory)
    plain, _ = answers(model, [more], memory=memories[0])
    drafted, _ = answers(model, [more], memory=memories[1], context=prompt, draft="mtp", adaptive=False)
    assert drafted == plain
    assert memories[0].length == memories[1].length


def test_bytes_of_the_head_count(model):
    """Keys and values of what the output was when it last drafted, except for the newest token."""
    memory, prompt = model.memory(), PROMPTS[3]
    events = list(sparing.generate(model, prompt, memory=memory, draft="mtp", adaptive=False, max_new_tokens=9))
    last = max(i for i, event in enumerate(events) if isinstance(event, sparing.Draft))
    known = len(prompt) + sum(len(event.ids) for event in events[:last] if isinstance(event, sparing.Commit))
    assert events[-1].stats["memory_bytes"] == memory.nbytes + (known - 1) * 2 * KV * D * 4


def test_rows_and_seeds(model):
    options = {"draft": "mtp", "temperature": 0.9, "seed": 4}
    together, _ = answers(model, **options)
    assert together == answers(model, **options)[0]
    assert together[0] == answers(model, PROMPTS[:1], **options)[0][0]


def test_sampled_drafts_carry_the_distribution_they_were_drawn_from(model):
    tokens = random_ids(6)
    sequence = SimpleNamespace(generator=torch.Generator().manual_seed(2))
    drafter = MTPDrafter(model)
    row = DraftRow(sequence, tokens.tolist(), drafter.head.memory(), states_of(model, tokens[:-1]))
    settings = Sampling(temperature=0.7, top_k=9)
    proposal = drafter.propose([row], [3], settings)[0]
    assert proposal.probabilities is not None
    assert proposal.probabilities.shape == (3, VOCAB)
    assert ((proposal.probabilities > 0).sum(-1) == 9).all()
    assert torch.allclose(proposal.probabilities.sum(-1), torch.ones(3))
    assert (proposal.probabilities.gather(-1, proposal.ids[:, None]) > 0).all()


# --- kept in fewer bits ---


def packed_names(head):
    return {name for name, module in head.named_modules() if isinstance(module, PackedWeight)}


@pytest.mark.parametrize("format", ["nvfp4", "int8"])
def test_a_packed_target_drafts_with_a_packed_head(format, folder, model):
    target = sparing.load(folder, weights=format, device="cpu")
    plain, _ = answers(target)
    drafted, stats = answers(target, draft="mtp", adaptive=False)
    assert drafted == plain and stats[0]["proposed"] > 0
    head, whole = load_drafting_head(target), load_drafting_head(model)
    roles = whole.roles()
    fits = {name for name, parameter in whole.named_parameters() if is_packed(roles[name], parameter.shape, format)}
    assert packed_names(head) == fits and "layers.1.mixer.experts.up_proj" in fits
    assert weight_bytes(head) < weight_bytes(whole)
    table = target.output_table()
    assert MTPDrafter(target).cost == (weight_bytes(head) + table.nbytes) / weight_bytes(target)


def test_a_head_that_a_file_holds_packed_stays_so(tmp_path):
    save(tmp_path)
    name = "mtp.layers.0.eh_proj.weight"
    packed = Int8Weight(**Int8Weight.encode(head_tensors()[name]))
    rewrite(tmp_path, tensors=lambda t: t | {name: packed.codes, f"{name}_scale": packed.scale[:, None]})
    target = load(tmp_path)
    assert answers(target, draft="mtp", adaptive=False)[0] == answers(target)[0]
    assert packed_names(load_drafting_head(target)) == {"layers.0.eh_proj.weight"}
    assert torch.equal(load_drafting_head(target).layers[0].eh_proj.weight.dequantize(), packed.dequantize())


def test_a_change_of_type_is_that_of_loading(folder):
    """Bit for bit, also of a head that was read before: what loading keeps in float32 is never rounded."""
    changed, loaded = load(folder), load(folder, "bfloat16")
    load_drafting_head(changed)
    changed.bfloat16()
    for ours, theirs in ((changed, loaded), (load_drafting_head(changed), load_drafting_head(loaded))):
        expected = theirs.state_dict()
        assert any(tensor.dtype == torch.float32 for tensor in expected.values())
        for name, tensor in ours.state_dict().items():
            assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name
    assert torch.equal(changed.logits(random_ids(9)), loaded.logits(random_ids(9)))
    assert answers(changed, draft="mtp", adaptive=False)[0] == answers(loaded, draft="mtp", adaptive=False)[0]


def test_a_change_of_device_moves_all(model):
    moved = copy.deepcopy(model)
    load_drafting_head(moved)
    moved.to("meta", torch.float16)
    for part in (moved, load_drafting_head(moved)):
        assert all(tensor.is_meta for tensor in (*part.parameters(), *part.buffers()))
        kept = {n.rpartition(".")[2] for n, t in part.state_dict().items() if t.dtype == torch.float32}
        assert kept <= {"A_log", "D", "dt_bias", "e_score_correction_bias"} and kept


# --- files and refusals ---


def test_stacked_experts(folder, tmp_path):
    expected, _ = answers(load(folder), draft="mtp")
    save(tmp_path)

    def stack(tensors):
        prefix = "mtp.layers.1.mixer.experts."
        for name in ("up_proj", "down_proj"):
            parts = [tensors.pop(f"{prefix}{e}.{name}.weight") for e in range(EXPERTS)]
            tensors[prefix + name] = torch.stack(parts)
        return tensors

    rewrite(tmp_path, tensors=stack)
    assert answers(load(tmp_path), draft="mtp")[0] == expected


def test_a_model_without_a_head_says_so(tmp_path):
    save_random(NemotronHForCausalLM, NemotronHConfig(**TINY), tmp_path, scale=hybrid_scale)
    with pytest.raises(ValueError, match=r"holds no drafting head \(mtp.\*\): use draft='ngram'"):
        sparing.generate(load(tmp_path), [1, 2], draft="mtp")
    with pytest.raises(ValueError, match="a llama model has no drafting head"):
        sparing.generate(without_file("dense"), [1, 2], draft="mtp")
    with pytest.raises(ValueError, match="was not loaded from a file"):
        sparing.generate(without_file("hybrid"), [1, 2], draft="mtp")


def test_damaged_heads_are_refused_when_asked_for(tmp_path):
    save(tmp_path)
    rewrite(tmp_path, tensors=lambda t: {k: v for k, v in t.items() if k != "mtp.layers.0.eh_proj.weight"})
    target = load(tmp_path)
    assert answers(target, PROMPTS[:1])[0]  # nobody asked for the head
    with pytest.raises(CheckpointError, match=r"mtp\.layers\.0\.eh_proj\.weight"):
        sparing.generate(target, [1, 2], draft="mtp")
    rewrite(tmp_path, tensors=lambda t: t | head_tensors() | {"mtp.layers.2.norm.weight": torch.ones(H)})
    with pytest.raises(CheckpointError, match="a drafting head of 3 layers, the config describes 2"):
        sparing.generate(load(tmp_path), [1, 2], draft="mtp")
    rewrite(tmp_path, config=lambda c: c.update(mtp_layers_block_type=["moe", "moe"]))
    with pytest.raises(CheckpointError, match="moe moe sees no other token"):
        sparing.generate(load(tmp_path), [1, 2], draft="mtp")
