"""Masks of encoders, canvases and training, entry by entry."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparing.kernels.masks import block_diffusion_training_mask, canvas_mask, encoder_mask


@given(st.integers(1, 12), st.none() | st.integers(1, 14), st.data())
def test_encoder_mask_entry_by_entry(P, window, data):
    valid = torch.tensor(data.draw(st.lists(st.booleans(), min_size=P, max_size=P)))
    start = data.draw(st.integers(0, P - 1))
    image = (start, data.draw(st.integers(start + 1, P)))
    mask = encoder_mask(P, window, valid, [image])
    for i in range(P):
        for j in range(P):
            causal = j <= i and (window is None or i - j < window)
            inside = image[0] <= i < image[1] and image[0] <= j < image[1]
            assert bool(mask[i, j]) == ((causal or inside) and bool(valid[j]))


@given(st.integers(0, 12), st.integers(1, 6), st.none() | st.integers(1, 14), st.data())
def test_canvas_mask_entry_by_entry(P, L, window, data):
    valid = torch.tensor(data.draw(st.lists(st.booleans(), min_size=P, max_size=P)), dtype=torch.bool)
    mask = canvas_mask(P, L, window, valid)
    assert mask.shape == (L, P + L)
    assert (mask == mask[0]).all()  # every query sees the same keys
    seen = [j for j in range(P) if valid[j]]
    if window is not None:
        seen = seen[max(0, len(seen) - (window - 1)) :]
    assert mask[0].nonzero()[:, 0].tolist() == seen + list(range(P, P + L))


@pytest.mark.parametrize("P", [0, 3, 5, 6, 7, 12])
def test_canvas_key_counts(P):
    assert canvas_mask(P, 8).sum(1).tolist() == [P + 8] * 8
    assert canvas_mask(P, 8, 6).sum(1).tolist() == [min(P, 5) + 8] * 8


def test_batched_validity():
    valid = torch.tensor([[False, False, True, True], [True, True, True, True]])
    for mask in (encoder_mask(4, 3, valid), canvas_mask(4, 2, 3, valid)):
        assert mask.ndim == 3
    for b in range(2):
        assert torch.equal(encoder_mask(4, 3, valid)[b], encoder_mask(4, 3, valid[b]))
        assert torch.equal(canvas_mask(4, 2, 3, valid)[b], canvas_mask(4, 2, 3, valid[b]))


@pytest.mark.parametrize("window", [None, 1, 4, 30])
def test_training_mask_is_the_canvas_mask_of_each_block(window):
    prefix, response, block = 5, 12, 4
    mask = block_diffusion_training_mask(prefix, response, block, window)
    assert mask.shape == (response, prefix + 2 * response)
    for query in range(response):
        start = query // block * block
        text = prefix + start  # clean tokens before the query's block
        columns = mask[query]
        assert torch.equal(columns[:text], canvas_mask(text, block, window)[0, :text])
        assert not columns[text : prefix + response].any()  # its own clean block and later ones would be the answer
        noisy = columns[prefix + response :].nonzero()[:, 0].tolist()
        assert noisy == list(range(start, start + block))
        if window is None or window > 1:
            assert columns[text - 1]
        assert not columns[text]


def test_refusals():
    with pytest.raises(ValueError, match="whole number of blocks"):
        block_diffusion_training_mask(3, 7, 4)
    for call in (lambda: encoder_mask(4, 0), lambda: canvas_mask(4, 2, 0)):
        with pytest.raises(ValueError, match="window"):
            call()
    with pytest.raises(ValueError, match="image block"):
        encoder_mask(4, image_blocks=[(2, 5)])
