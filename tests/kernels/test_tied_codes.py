"""Attention over the codes of values alone, from which keys follow, against the same written out in float64."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from sparing.config.codes import TurboQuant
from sparing.config.rope import RopeParameters
from sparing.kernels import KeysFromValues
from sparing.kernels.codes import Codes
from sparing.kernels.tied_codes import attention_over_tied_codes
from sparing.memory.turboquant.coder import Coder, make_coder
from sparing.memory.turboquant.quantisers import SplitQuantiser
from tests.memory.turboquant.codes import as_codes

KV_HEADS = 2
ROPE = {
    "proportional": RopeParameters("proportional", 10000.0, partial_rotary_factor=0.25),
    "default": RopeParameters("default", 10000.0),
}


@dataclass
class Layer:
    """Codes of n values, and how keys follow from them."""

    coder: Coder
    codes: list[Codes]
    n: int
    keys: KeysFromValues


def layer(n: int, d: int, bits: float, rope: str, **options: Any) -> Layer:
    generator = torch.Generator().manual_seed(n + d)
    coder = make_coder(TurboQuant(bits, bits, **options), 3, "values", KV_HEADS, d, torch.device("cpu"))
    channels = torch.linspace(0.3, 3, d)[torch.randperm(d, generator=generator)]
    x = torch.randn(n, KV_HEADS, d, generator=generator) * channels
    coder = coder.learnt(x)
    weight = torch.empty(d).uniform_(-1.5, 1.5, generator=generator)
    return Layer(coder, as_codes(coder, x), n, KeysFromValues(weight, ROPE[rope]))


def written_out(q, of, positions, scale):
    """(out, lse) in float64, from values decoded as a whole."""
    values = of.coder.decode(of.codes, 0, of.n).double()
    k = KeysFromValues(of.keys.weight.double(), of.keys.rope)(values, positions)
    group = q.shape[1] // KV_HEADS
    k, v = k.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
    scores = torch.einsum("thd,hnd->thn", q.double(), k) * scale
    return torch.einsum("thn,hnd->thd", scores.softmax(-1), v), scores.logsumexp(-1)


def compare(of: Layer, where: int | torch.Tensor, tokens: int, group: int, scale: float = 0.2) -> None:
    n, d = of.n, len(of.keys.weight)
    q = torch.randn(tokens, KV_HEADS * group, d, generator=torch.Generator().manual_seed(1))
    out, lse = attention_over_tied_codes(q, of.codes, n, of.keys, where, of.coder, scale=scale)
    positions = torch.arange(where, where + n) if isinstance(where, int) else where
    expected, expected_lse = written_out(q, of, positions, scale)
    torch.testing.assert_close(of.coder.quantiser.assemble(out).double(), expected, rtol=1e-4, atol=3e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("n", [1, 63, 64, 65, 300])
@pytest.mark.parametrize("rope", ROPE)
@pytest.mark.parametrize("d", [32, 128, 512])
def test_lengths_and_sizes(each_kernel_set, n, rope, d):
    """Head sizes whose transform is one matrix and two factors, of which rows are taken out whole and in part."""
    compare(layer(n, d, 4, rope), 5, tokens=1, group=3)


@pytest.mark.parametrize("bits", [1, 2, 2.5, 3, 3.5, 5, 6, 7, 8])
@pytest.mark.parametrize("variant", ["mse", "prod"])
def test_every_layout(each_kernel_set, bits, variant):
    compare(layer(130, 64, bits, "proportional", variant=variant), 0, tokens=3, group=2)


@pytest.mark.parametrize("d", [12, 40, 80, 96, 192])
@pytest.mark.parametrize("rotation", ["rht", "haar", "identity"])
def test_every_rotation(each_kernel_set, d, rotation):
    """Sizes that are no whole sixteens, Hadamard matrices of orders 12 and 20, and whole matrices."""
    compare(layer(70, d, 4, "proportional", rotation=rotation, scale_dtype="float32"), 9, tokens=2, group=1)


@pytest.mark.parametrize(("tokens", "group"), [(1, 1), (2, 7), (5, 3), (40, 4)])
def test_queries_and_groups(each_kernel_set, tokens, group):
    several = layer(2200, 64, 3, "default")
    compare(several, 17, tokens, group, scale=-0.1)
    compare(several, torch.stack([torch.randperm(5000)[:2200].sort().values for _ in range(KV_HEADS)]), tokens, group)


@pytest.mark.parametrize(("tokens", "group"), [(1, 1), (5, 3), (20, 4)])
@pytest.mark.parametrize("d", [40, 64, 512])
def test_where_exactness_is_not_asked_for(each_kernel_set, tokens, group, d):
    """As close as rounding to bfloat16 leaves it."""
    of = layer(700, d, 4, "proportional")
    q = torch.randn(tokens, KV_HEADS * group, d)
    out, lse = attention_over_tied_codes(q, of.codes, 700, of.keys, 3, of.coder, scale=0.02, exact=False)
    expected, expected_lse = written_out(q, of, torch.arange(3, 703), 0.02)
    mixed = of.coder.quantiser.assemble(out)
    assert (mixed - expected).norm() < 0.005 * expected.norm()
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=0.005)


def test_channels_that_are_chosen_anew_are_taken_out_anew(each_kernel_set):
    """Codes that are restored bring their own choice of channels."""
    mine, other = layer(70, 64, 2.5, "proportional"), layer(71, 64, 2.5, "proportional")
    compare(mine, 0, 1, 1)
    assert isinstance(mine.coder.quantiser, SplitQuantiser)
    assert mine.coder.channels is not None and other.coder.channels is not None
    assert not torch.equal(mine.coder.channels, other.coder.channels)
    compare(replace(mine, coder=mine.coder.restored(other.coder.state()), codes=other.codes, n=71), 0, 1, 1)


def test_native_kernels_run(native_kernel_set, monkeypatch):
    monkeypatch.setattr("sparing.kernels.tied_codes.decode_codes", None)
    compare(layer(70, 64, 4, "default"), 0, 1, 1)
