"""Random rotations: Haar and Hadamard."""

import numpy as np
import pytest
import torch

from sparing.memory.turboquant.rotation import ROTATIONS, Rotation, make_rotation, random_rotation

SIZES = (2, 12, 16, 20, 24, 40, 48, 64, 80, 96, 128, 160, 192, 256, 384, 512)


def test_the_worked_example():
    rotation = random_rotation(3, A=[[1, 2, 0], [2, -1, 1], [2, 1, 3]])
    expected = [[1 / 3, 0.7542472333, -0.5656854249], [2 / 3, -0.612825877, -0.4242640687], [2 / 3, 0.2357022604, 0.5]]
    expected[2][2] = 0.7071067812
    torch.testing.assert_close(rotation, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("d", [1, 2, 7, 64, 129])
def test_haar_is_gram_schmidt_on_the_columns(d):
    a = np.random.default_rng(5).standard_normal((d, d))
    rotation = random_rotation(d, seed=5)
    assert torch.equal(rotation, random_rotation(d, A=a))
    assert (rotation.T @ rotation - torch.eye(d)).abs().max() < 1e-13
    torch.testing.assert_close(rotation[:, 0], torch.tensor(a[:, 0] / np.linalg.norm(a[:, 0])))
    triangle = rotation.T @ torch.tensor(a)
    assert (triangle.diagonal() > 0).all()
    assert triangle.tril(-1).abs().max() < 1e-12
    vectors = torch.randn(2, d, dtype=torch.float64)
    torch.testing.assert_close((vectors @ rotation.T) @ (vectors @ rotation.T).T, vectors @ vectors.T)


def test_sizes_and_types_of_haar():
    assert random_rotation(1, A=[[2.0]]).tolist() == [[1.0]]
    assert random_rotation(4, 0, dtype=torch.float32).dtype == torch.float32
    with pytest.raises(ValueError, match=r"\[2, 3\], expected \[2, 2\]"):
        random_rotation(2, A=[[1, 2, 3], [4, 5, 6]])


@pytest.mark.parametrize("d", SIZES)
def test_a_hadamard_rotation_has_even_entries(d):
    rotation = make_rotation("rht", d, 0, 3, 1)
    matrix = rotation.matrix.double()
    torch.testing.assert_close(matrix.abs(), torch.full((d, d), d**-0.5, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(d, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ROTATIONS)
@pytest.mark.parametrize("d", [48, 64])
def test_applying_is_multiplying(kind, d):
    rotation = make_rotation(kind, d, 1)
    x = torch.randn(3, 5, d)
    torch.testing.assert_close(rotation.apply(x), x @ rotation.matrix.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rotation.invert(x), x @ rotation.matrix, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rotation.invert(rotation.apply(x)), x, rtol=1e-5, atol=1e-5)
    assert rotation.apply(x[:, :0]).shape == (3, 0, d)


@pytest.mark.parametrize("kind", ["rht", "haar"])
@pytest.mark.parametrize("d", [2, 9, 10, 11, 12, 16, 48, 64, 80, 128])
def test_a_vector_is_rotated_alike_in_any_company(kind, d):
    """Codes must not depend on how many vectors were encoded at once, nor on where a vector stood among them."""
    rotation = make_rotation(kind, d, 9)
    x = torch.randn(500, d)
    whole = rotation.apply(x)
    for start, size in ((0, 13), (1, 100), (3, 1), (7, 64), (16, 16), (40, 333)):
        assert torch.equal(rotation.apply(x[start : start + size]), whole[start : start + size])
    assert torch.equal(rotation.apply(x[5]), whole[5])


def test_seeds():
    first = make_rotation("rht", 64, 0, 0, 0)
    assert make_rotation("rht", 64, 0, 0, 0) is first
    for other in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        assert not torch.equal(make_rotation("rht", 64, *other).matrix, first.matrix)


def test_sizes_without_a_hadamard_matrix():
    matrix = make_rotation("rht", 28, 4).matrix
    assert torch.equal(matrix, random_rotation(28, (4,)).float())
    with pytest.raises(ValueError, match="none of size 28"):
        make_rotation("hadamard", 28, 4)
    with pytest.raises(ValueError, match="rotation='qr' is not known"):
        make_rotation("qr", 64, 0)


def test_one_hot_vectors_come_out_even_under_hadamard():
    rotated = make_rotation("rht", 128, 7).apply(torch.eye(128)[3])
    torch.testing.assert_close(rotated.abs(), torch.full((128,), 128**-0.5))


def test_an_explicit_matrix():
    matrix = random_rotation(6, 1).float()
    rotation = Rotation(6, matrix=matrix)
    assert torch.equal(rotation.apply(torch.eye(6)).T, matrix)
