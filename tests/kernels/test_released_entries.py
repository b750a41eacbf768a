"""Entries and keys in the bytes of DeepSeek-V4's release, against torch's own types of eight bits."""

import math

import pytest
import torch

from sparing.config.entry_formats import entry_bytes, key_bytes
from sparing.kernels.hadamard import hadamard
from sparing.kernels.released_entries import decode_entries, decode_keys, encode_entries, encode_keys, round_queries
from tests.kernel_sets import using

pytestmark = pytest.mark.usefixtures("each_kernel_set")

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
SIZES = [(512, 64), (128, 64), (32, 8), (100, 10), (65, 1), (64, 0), (2, 1)]


def spread(*shape):
    """Numbers of very different sizes."""
    return torch.randn(shape) * torch.exp2(torch.randint(-12, 9, (*shape[:-1], 1)) + torch.randn(shape))


def rounded_block(block, largest, smallest, cast):
    """A block as its release rounds it: divided by a power of two, cast and multiplied again, in float64."""
    amax = max(block.abs().max().item(), smallest)
    scale = 2.0 ** math.ceil(math.log2(torch.tensor(amax / largest, dtype=torch.float32).item()))
    return cast((block.double() / scale).clamp(-largest, largest)) * scale, scale


def to_e2m1(x):
    """The nearest value, of two the one with the even code."""
    distance = (x.abs()[:, None] - E2M1.double()).abs()
    distance[:, 1::2] += 1e-12
    return E2M1.double()[distance.argmin(-1)].copysign(x)


def test_sizes_of_the_release():
    assert entry_bytes(512, 64) == 584 and key_bytes(128) == 68
    assert encode_entries(torch.zeros(3, 512), 64).shape == (3, 584)
    assert encode_keys(torch.zeros(2, 3, 128)).shape == (2, 3, 68)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "rotary"), SIZES)
def test_entries_against_torchs_own_types(size, rotary, dtype):
    x = spread(7, size).to(dtype)
    packed, plain = encode_entries(x, rotary), size - rotary
    assert packed.dtype == torch.uint8 and packed.shape == (7, entry_bytes(size, rotary))
    back = decode_entries(packed, size, rotary)
    scales = packed[:, plain + 2 * rotary :].view(torch.float8_e8m0fnu).float()
    codes = packed[:, :plain].contiguous().view(torch.float8_e4m3fn).double()
    assert torch.equal(packed[:, plain : plain + 2 * rotary].contiguous().view(torch.bfloat16), x[:, plain:].bfloat16())
    for row in range(7):
        for block in range(-(-plain // 64)):
            at = slice(64 * block, min(64 * block + 64, plain))
            expected, scale = rounded_block(x[row, at], 448.0, 1e-4, lambda x: x.to(torch.float8_e4m3fn).double())
            assert scales[row, block] == scale
            assert torch.equal(codes[row, at] * scale, expected)
            assert torch.equal(back[row, at].double(), expected)
    assert torch.equal(back[:, plain:], x[:, plain:].bfloat16().float())
    for exact in (torch.bfloat16, torch.float32):
        assert torch.equal(decode_entries(packed, size, rotary, exact).float(), back)
    assert torch.equal(decode_entries(encode_entries(back, rotary), size, rotary), back)
    assert torch.equal(encode_entries(x[3], rotary), packed[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [32, 64, 128, 512])
def test_keys_against_the_table(size, dtype):
    x = (torch.randint(-128, 129, (5, size)) * torch.exp2(torch.randint(-30, 9, (5, 1)))).to(dtype)  # exact sums
    packed, turned = encode_keys(x), hadamard(x)
    assert packed.dtype == torch.uint8 and packed.shape == (5, key_bytes(size))
    back = decode_keys(packed, size)
    scales = packed[:, size // 2 :].contiguous().view(torch.float8_e8m0fnu).float()
    for row in range(5):
        for block in range(size // 32):
            at = slice(32 * block, 32 * block + 32)
            expected, scale = rounded_block(turned[row, at], 6.0, 6 * 2.0**-126, to_e2m1)
            assert scales[row, block] == scale
            assert torch.equal(back[row, at].double().abs(), expected.abs())
            assert torch.equal(back[row, at].double(), expected)
    signs = packed[:, : size // 2] >> 3 & 1, packed[:, : size // 2] >> 7
    assert torch.equal(torch.stack(signs, -1).flatten(-2).bool(), turned < 0)  # the earlier number in the low half
    assert torch.equal(decode_keys(packed, size, torch.bfloat16).float(), back)
    assert torch.equal(round_queries(x), back.to(dtype))
    assert torch.equal(encode_keys(x[3]), packed[3])


def test_what_is_not_finite_stays_so():
    x = torch.randn(4, 128)
    x[0, 3], x[1, 3], x[2, 120] = math.nan, math.inf, math.nan
    back = decode_entries(encode_entries(x, 16), 128, 16)
    assert back[0, :64].isnan().all() and back[1, :64].isnan().all() and back[2, 120].isnan()
    assert back[:2, 64:].isfinite().all() and back[2, :112].isfinite().all() and back[3].isfinite().all()
    keys = decode_keys(encode_keys(x), 128)
    assert keys[:3].isnan().all() and keys[3].isfinite().all()


def test_zeros_and_tiny_numbers():
    for x in (torch.zeros(2, 128), torch.full((2, 128), 1e-44)):
        assert (decode_entries(encode_entries(x, 64), 128, 64) <= 1e-44).all()
        assert decode_keys(encode_keys(x), 128).isfinite().all()
    assert encode_entries(torch.zeros(128), 64)[-8:].tolist() == [105, 0, 0, 0, 0, 0, 0, 0]  # 2^-22, above 1e-4 / 448


def test_refusals():
    with pytest.raises(ValueError, match="an entry of 16 numbers cannot have 16 that turn: use 0 to 15"):
        encode_entries(torch.zeros(16), 16)
    with pytest.raises(ValueError, match=r"packed has shape \[583\], expected \[\.\.\., 584\]"):
        decode_entries(torch.zeros(583, dtype=torch.uint8), 512, 64)
    with pytest.raises(ValueError, match="packed has dtype float32, expected uint8"):
        decode_entries(torch.zeros(584), 512, 64)
    for size in (16, 48, 96):
        refusal = f"a key of {size} numbers has no FP4 form: use a power of two of at least 32"
        for function in (encode_keys, round_queries):
            with pytest.raises(ValueError, match=refusal):
                function(torch.zeros(3, size))
        with pytest.raises(ValueError, match=refusal):
            decode_keys(torch.zeros(27, dtype=torch.uint8), size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_set_of_kernels_gives_the_bytes_of_the_reference(dtype):
    """Of entries; of keys too but for some numbers that rounding in the transform takes over to their neighbours."""
    ties = torch.arange(1, 897).view(7, 128) / 2**10 * torch.tensor([1.0, -1.0]).repeat(64)
    x = torch.cat([ties, spread(90, 128)]).to(dtype)
    turned, threads = encode_keys(x), torch.get_num_threads()
    with using("reference"):
        expected, keys = encode_entries(x, 16), decode_keys(encode_keys(x), 128)
        entries = decode_entries(expected, 128, 16, dtype)
    torch.set_num_threads(3)
    try:
        assert torch.equal(encode_entries(x, 16), expected)
        assert torch.equal(decode_entries(expected, 128, 16, dtype), entries)
        assert torch.equal(encode_keys(x), turned) and torch.equal(round_queries(x).float(), decode_keys(turned, 128))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(encode_entries(x.T.contiguous().T, 16), expected)
    assert (decode_keys(turned, 128) == keys).float().mean() > 0.995
    assert encode_keys(x[:0]).shape == (0, 68) and decode_entries(expected[:0], 128, 16).shape == (0, 128)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_byte_is_read_alike(dtype):
    packed = (torch.arange(256)[:, None] + 3 * torch.arange(128)).to(torch.uint8)  # every byte in every place
    with using("reference"):
        entries, keys = decode_entries(packed, 112, 8, dtype), decode_keys(packed[:, :68], 128, dtype)
    torch.testing.assert_close(decode_entries(packed, 112, 8, dtype), entries, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(decode_keys(packed[:, :68], 128, dtype), keys, rtol=0, atol=0, equal_nan=True)
