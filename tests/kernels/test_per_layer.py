"""Per-layer inputs and their gate against float64."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from sparing.kernels import per_layer_gate, per_layer_inputs, rms_norm

B, T, H, P, LAYERS, VOCAB = 2, 5, 12, 5, 3, 20


def inputs(seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (B, T), generator=g)
    return (
        ids,
        torch.randn(B, T, H, generator=g),
        torch.randn(VOCAB, LAYERS * P, generator=g),
        torch.randn(LAYERS * P, H, generator=g),
        0.9 + 0.3 * torch.randn(P, generator=g),
    )


def gate(seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(B, T, H), (B, T, P), (P, H), (H, P), (H,)]
    return [torch.randn(shape, generator=g) for shape in shapes]


def test_inputs_against_float64():
    ids, embeds, table, proj, weight = inputs()
    ple = per_layer_inputs(ids, embeds, table, proj, weight, LAYERS)
    assert ple.shape == (B, T, LAYERS, P)
    for layer in range(LAYERS):
        columns = slice(layer * P, (layer + 1) * P)  # layer-major packing
        context = embeds.double() @ proj[columns].double().T / H**0.5
        context = context / (context.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
        expected = (context + table[ids][..., columns].double() * P**0.5) / 2**0.5
        torch.testing.assert_close(ple[:, :, layer].double(), expected, rtol=1e-5, atol=1e-5)


def test_an_empty_table_leaves_the_context():
    ids, embeds, table, proj, weight = inputs()
    ple = per_layer_inputs(ids, embeds, torch.zeros_like(table), proj, weight, LAYERS)
    context = (embeds @ proj.T * H**-0.5).view(B, T, LAYERS, P)
    torch.testing.assert_close(ple, rms_norm(context, weight) / 2**0.5)


def test_a_layer_reads_only_its_own_columns():
    ids, embeds, table, proj, weight = inputs()
    before = per_layer_inputs(ids, embeds, table, proj, weight, LAYERS)
    table[:, P : 2 * P] += 1
    after = per_layer_inputs(ids, embeds, table, proj, weight, LAYERS)
    assert torch.equal(before[:, :, [0, 2]], after[:, :, [0, 2]])
    assert (before[:, :, 1] != after[:, :, 1]).all()


def test_gate_against_float64():
    x, ple, w_gate, w_proj, weight = (t.double() for t in gate())
    z = x @ w_gate.T
    gelu = 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)))
    y = (gelu * ple) @ w_proj.T
    expected = x + y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    torch.testing.assert_close(per_layer_gate(*gate()).double(), expected, rtol=1e-4, atol=1e-4)


def test_a_zero_input_is_the_identity():
    x, ple, w_gate, w_proj, weight = gate()
    assert torch.equal(per_layer_gate(x, torch.zeros_like(ple), w_gate, w_proj, weight), x)


@given(st.floats(0.5, 1e3), st.floats(0.5, 1e3))
def test_the_gate_only_chooses_a_direction(a, b):
    x, ple, w_gate, w_proj, weight = gate()
    one = torch.ones_like(weight)
    added = per_layer_gate(x, a * ple, w_gate, b * w_proj, one) - x
    torch.testing.assert_close(added.square().mean(-1).sqrt(), torch.ones(B, T), rtol=0, atol=1e-3)
    torch.testing.assert_close(added, per_layer_gate(x, ple, w_gate, w_proj, one) - x, rtol=1e-3, atol=1e-3)
