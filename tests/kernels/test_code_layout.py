"""The layout: exact, and where the layout says each code must be."""

import pytest
import torch

from sparing.kernels.code_layout import BLOCK, block_bytes, canonical, lay_out, padded, planes

ROLES = ["keys", "values"]


def random_codes(*shape: int, bits: int) -> torch.Tensor:
    return torch.randint(0, 1 << bits, shape, generator=torch.Generator().manual_seed(bits)).to(torch.uint8)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_unpacking_what_was_packed(bits, role):
    for dims in (6, 16, 48, 64, 80, 96, 128, 256, 512):
        for n in (1, 15, 16, 17, 63, 64, 65) if dims != 512 else (65,):
            codes = random_codes(2, n, dims, bits=bits)
            laid_out = lay_out(codes, bits, role)
            assert laid_out.shape == (2, -(-n // BLOCK), block_bytes(dims, bits))
            assert torch.equal(canonical(laid_out, bits, role, n, dims), codes)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_nothing(bits, role):
    laid_out = lay_out(torch.zeros(3, 0, 32, dtype=torch.uint8), bits, role)
    assert laid_out.shape == (3, 0, block_bytes(32, bits))
    assert canonical(laid_out, bits, role, 0, 32).shape == (3, 0, 32)


def test_keys_of_four_bits():
    """Line g of a sub-block of 16 tokens: lane t, byte j: dimension 8g + j below, 8g + 4 + j above."""
    codes = random_codes(BLOCK, 128, bits=4)
    laid_out = lay_out(codes, 4, "keys")[0].view(4, 16, 16, 4)  # sub-block, line, lane, byte
    for sub, g, t, j in [(0, 0, 0, 0), (1, 3, 7, 2), (3, 15, 15, 3)]:
        low, high = codes[16 * sub + t, 8 * g + j], codes[16 * sub + t, 8 * g + 4 + j]
        assert laid_out[sub, g, t, j] == low + 16 * high


def test_keys_of_three_bits():
    """Per sub-block: lines of 2-bit magnitudes, then words of signs; indices count outwards from the middle."""
    codes = random_codes(BLOCK, 48, bits=3)
    per_sub = lay_out(codes, 3, "keys")[0].view(4, 48 * 16 * 3 // 8)
    for sub, g, i, t, j in [(0, 0, 0, 0, 0), (2, 1, 3, 9, 2), (3, 2, 1, 15, 3)]:
        code = int(codes[16 * sub + t, 16 * g + 4 * i + j])
        line = per_sub[sub, : 3 * 64].view(3, 16, 4)
        assert (int(line[g, t, j]) >> (2 * i)) & 3 == (code - 4 if code >= 4 else 3 - code)
        word = per_sub[sub, 3 * 64 :].view(12, 8)[4 * g + i].tolist()
        assert (int.from_bytes(bytes(word), "little") >> (4 * t + j)) & 1 == (code < 4)


def test_keys_of_two_bits():
    codes = random_codes(BLOCK, 32, bits=2)
    laid_out = lay_out(codes, 2, "keys")[0].view(4, 2, 16, 4)
    for sub, g, i, t, j in [(0, 0, 0, 0, 0), (3, 1, 3, 15, 3), (1, 0, 2, 6, 1)]:
        assert (int(laid_out[sub, g, t, j]) >> (2 * i)) & 3 == codes[16 * sub + t, 16 * g + 4 * i + j]


def test_values_of_four_bits():
    """Lines by 16 dimensions, then by 8 tokens: lane l, byte j: token j below, token 4 + j above."""
    codes = random_codes(BLOCK, 80, bits=4)
    laid_out = lay_out(codes, 4, "values")[0].view(5, 8, 16, 4)  # dimensions / 16, sub-block of 8 tokens, lane, byte
    for c, sub, lane, j in [(0, 0, 0, 0), (4, 7, 15, 3), (2, 5, 9, 1)]:
        low, high = codes[8 * sub + j, 16 * c + lane], codes[8 * sub + 4 + j, 16 * c + lane]
        assert laid_out[c, sub, lane, j] == low + 16 * high


def test_values_of_three_bits():
    codes = random_codes(BLOCK, 32, bits=3)
    per_strip = lay_out(codes, 3, "values")[0].view(2, 16 * 64 * 3 // 8)
    for c, g, i, lane, j in [(0, 0, 0, 0, 0), (1, 3, 2, 11, 3)]:
        code = int(codes[16 * g + 4 * i + j, 16 * c + lane])
        assert (int(per_strip[c, : 4 * 64].view(4, 16, 4)[g, lane, j]) >> (2 * i)) & 3 == (
            code - 4 if code >= 4 else 3 - code
        )
        word = per_strip[c, 4 * 64 :].view(16, 8)[4 * g + i].tolist()
        assert (int.from_bytes(bytes(word), "little") >> (4 * lane + j)) & 1 == (code < 4)


def test_padding_is_the_smallest_positive_centroid():
    laid_out = lay_out(torch.zeros(1, 10, dtype=torch.uint8), 4, "keys")
    codes = canonical(laid_out, 4, "keys", BLOCK, padded(10))
    assert (codes[0, :10] == 0).all()
    assert (codes[0, 10:] == 8).all() and (codes[1:] == 8).all()


def test_widths():
    assert [planes(bits) for bits in range(1, 9)] == [[1], [2], [2, 1], [4], [4, 1], [4, 2], [4, 2, 1], [8]]
    for bits in (0, 9):
        with pytest.raises(ValueError, match=f"bits is {bits}"):
            planes(bits)
    with pytest.raises(ValueError, match="role is 'queries'"):
        lay_out(torch.zeros(1, 16, dtype=torch.uint8), 4, "queries")
