"""DeepSeek-V4's drafting head: no live peer has one, so against its formulas written out, and against itself."""

import pytest
import torch

import sparing
from sparing.checkpoint import save_weights, write_json
from sparing.errors import CheckpointError
from sparing.models.batch import Row
from sparing.models.deepseek_v4_mtp import DeepseekV4MTP
from sparing.models.loading import load_drafting_head
from tests.tiny import COMPRESSED, ENDLESS, built, compressed_scale, random_ids, randomise


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with a drafting head, and weights under which the model repeats itself enough to be drafted."""
    model = built(COMPRESSED)
    head = DeepseekV4MTP(model)
    head = head.to_empty(device="cpu") if any(p.is_meta for p in head.parameters()) else head
    randomise(head, 7, compressed_scale)
    path = tmp_path_factory.mktemp("mtp")
    own = {f"mtp.{name}": tensor for name, tensor in head.state_dict().items()}
    save_weights(path, {**model.state_dict(), **own})
    write_json(path / "config.json", COMPRESSED | ENDLESS)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return sparing.load(folder)


def rms(x, weight=None, eps=1e-6):
    x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return x if weight is None else x * weight


def test_the_first_draft_is_what_the_formulas_say(model):
    """With one entry attention sees itself alone: everything can be written out."""
    head = load_drafting_head(model)
    streams = model.hidden_states([5])[-1][0].double()  # [n, H]
    layer = head.layer.double()
    try:
        # The first entry of a text has no embedding.
        x = rms(streams, layer.hnorm.weight) @ layer.h_proj.weight.T

        def mapped(part, x):
            n = len(x)
            v = rms(x.flatten()) @ part.fn.T
            pre = torch.sigmoid(v[:n] * part.scale[0] + part.base[:n]) + 1e-6
            post = 2 * torch.sigmoid(v[n : 2 * n] * part.scale[1] + part.base[n : 2 * n])
            c = torch.softmax((v[2 * n :] * part.scale[2] + part.base[2 * n :]).view(n, n), -1) + 1e-6
            c = c / (c.sum(0) + 1e-6)
            for _ in range(19):
                c = c / (c.sum(1, keepdim=True) + 1e-6)
                c = c / (c.sum(0) + 1e-6)
            return pre @ x, post, c

        def step(part, x, branch):
            u, post, comb = mapped(part, x)
            return post[:, None] * branch(u) + comb.T @ x

        def attention(u):
            a, h = layer.self_attn, rms(u, layer.input_layernorm.weight)
            q = rms((rms(h @ a.q_a_proj.weight.T, a.q_a_norm.weight) @ a.q_b_proj.weight.T).view(a.heads, -1))
            kv = rms(h @ a.kv_proj.weight.T, a.kv_norm.weight)
            weight = torch.softmax(torch.stack([q @ kv * len(kv) ** -0.5, a.sinks], -1), -1)[:, 0]
            mixed = (weight[:, None] * kv).view(a.groups, -1)  # at position 0 nothing turns
            grouped = torch.einsum("gi,goi->go", mixed, a.o_a_proj.weight.unflatten(0, (a.groups, -1)))
            return a.o_b_proj.weight @ grouped.flatten()

        def experts(u):
            m, h = layer.mlp, rms(u, layer.post_attention_layernorm.weight)
            s = torch.nn.functional.softplus(m.gate.weight @ h).sqrt()
            chosen = (s + m.gate.e_score_correction_bias).topk(m.k).indices
            w = s[chosen] / s[chosen].sum() * m.scale

            def mlp(gate, up, down):
                return down @ (torch.nn.functional.silu((gate @ h).clamp(max=1.5)) * (up @ h).clamp(-1.5, 1.5))

            y = mlp(*(getattr(m.shared_experts, f"{n}_proj").weight for n in ("gate", "up", "down")))
            for e, share in zip(chosen, w, strict=True):
                y = y + share * mlp(*m.experts.gate_up_proj[e].chunk(2), m.experts.down_proj[e])
            return y

        x = step(layer.ffn_hc, step(layer.attn_hc, x, attention), experts)
        v = rms(x.flatten()) @ layer.hc_head.hc_fn.T
        u = (torch.sigmoid(v * layer.hc_head.hc_scale + layer.hc_head.hc_base) + 1e-6) @ x
        expected = rms(u, layer.norm.weight) @ model.lm_head.weight.double().T
    finally:
        head.layer.float()
    logits, _ = head.run([Row(torch.tensor([9]), head.memory())], model.hidden_states([5])[-1])
    torch.testing.assert_close(logits[0], expected.float(), rtol=0, atol=3e-5)


@pytest.mark.parametrize("draft", ["mtp", "ngram"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_greedy_text_is_that_of_plain_decoding(model, draft, tokens):
    prompts = [random_ids(length, seed=length).tolist() for length in (1, 6, 19)]
    options = {"temperature": 0.0, "max_new_tokens": 30}
    for prompt in (*prompts, prompts):
        plain = texts(sparing.generate(model, prompt, **options))
        drafted = texts(sparing.generate(model, prompt, draft=draft, draft_tokens=tokens, adaptive=False, **options))
        assert drafted == plain


def texts(events):
    found: dict[int, list[int]] = {}
    for event in events:
        if isinstance(event, sparing.Commit):
            found.setdefault(event.row, []).extend(event.ids)
    return found


def test_a_later_drafter_is_refused_once_it_is_asked_for(folder, tmp_path):
    from safetensors.torch import load_file

    tensors = load_file(next(folder.glob("*.safetensors")))
    save_weights(tmp_path, {**tensors, "mtp.0.main_proj.weight": torch.zeros(4, 4)})
    write_json(tmp_path / "config.json", COMPRESSED | ENDLESS)
    model = sparing.load(tmp_path)
    assert model.logits([1, 2]).shape == (2, 61)
    with pytest.raises(CheckpointError, match="main_proj"):
        sparing.generate(model, [1, 2], draft="mtp")
