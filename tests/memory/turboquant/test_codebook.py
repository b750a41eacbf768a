"""Codebooks against the tables of the method's reference computation and against closed forms."""

import math

import pytest
import torch

from sparing.memory.turboquant.codebook import lloyd_max_codebook

GAUSS = {
    1: [0.797884560803],
    2: [0.452780034636, 1.510417608499],
    3: [0.245094178944, 0.756005281206, 1.343909278505, 2.151945704537],
    4: [
        *(0.128395029851, 0.388048299490, 0.656759118532, 0.942340456487),
        *(1.256231197347, 1.618046386022, 2.069017226531, 2.732589570995),
    ],
}
SPHERE_4 = {  # sqrt(d) times the positive half at 4 bits
    64: [
        0.1273521804,
        0.3847182657,
        0.6504941482,
        0.9318940186,
        1.2394042223,
        1.5908491290,
        2.0233098258,
        2.6463704910,
    ],
    128: [0.1278731517, 0.3863809157, 0.6536189477, 0.9370970214, 1.2477704583, 1.604342660, 2.045925380, 2.6888592568],
    512: [
        *(0.1282644836, 0.3876310336, 0.6559726699, 0.9410258421),
        *(1.2541071567, 1.6146006371, 2.0631991251, 2.7215386483),
    ],
}
OUTERMOST = {  # bits 5..8
    64: [3.11547224, 3.52836220, 3.89380347, 4.21925829],
    128: [3.18657845, 3.63326372, 4.03671944, 4.40362956],
    256: [3.22326583, 3.68791761, 4.11190080, 4.50155061],
    None: [3.260732493401, 3.7441012711, 4.1896941567, 4.6035356124],
}
DISTORTION = {  # relative error of a vector, bits 1..5
    8: [0.322430, 0.094771, 0.026063, 0.0068704],
    64: [0.358387, 0.114526, 0.033391, 0.0091315, 0.0023992],
    80: [0.359389, 0.115115, 0.033620, 0.0092045, 0.0024200],
    128: [0.360889, 0.116000, 0.033966, 0.0093148, 0.0024515],
    512: [0.362758, 0.117111, 0.034402, 0.0094542, 0.0024913],
    None: [0.36338023, 0.11748185, 0.03454776, 0.00950101, 0.00250467],
}


def upper(d, bits):
    centroids, _, _ = lloyd_max_codebook(d, bits)
    return (centroids[2 ** (bits - 1) :] * (d or 1) ** 0.5).tolist()


@pytest.mark.parametrize("bits", GAUSS)
def test_the_normal_distribution(bits):
    assert upper(None, bits) == pytest.approx(GAUSS[bits], abs=2e-12)


@pytest.mark.parametrize(("bits", "total"), [(6, 42.506492447), (7, 86.516299666), (8, 174.758768390)])
def test_sums_at_many_bits(bits, total):
    assert sum(upper(None, bits)) == pytest.approx(total, abs=5e-9)


@pytest.mark.parametrize("d", SPHERE_4)
def test_the_sphere(d):
    assert upper(d, 4) == pytest.approx(SPHERE_4[d], abs=1e-10)


@pytest.mark.parametrize("d", OUTERMOST)
def test_outermost_centroids(d):
    assert [upper(d, bits)[-1] for bits in range(5, 9)] == pytest.approx(OUTERMOST[d], abs=1e-8)


@pytest.mark.parametrize("d", DISTORTION)
def test_distortion(d):
    errors = [(d or 1) * lloyd_max_codebook(d, bits)[2] for bits in range(1, len(DISTORTION[d]) + 1)]
    assert errors == pytest.approx(DISTORTION[d], rel=2e-5)


def test_boundaries_lie_halfway():
    _, boundaries, _ = lloyd_max_codebook(None, 3)
    assert boundaries[4:].tolist() == pytest.approx([0.500549730075, 1.049957279855, 1.747927491521], abs=1e-12)


@pytest.mark.parametrize("bits", range(1, 9))
def test_three_dimensions_are_uniform(bits):
    """There the paper's lower bound, 4^-bits, is attained."""
    centroids, _, error = lloyd_max_codebook(3, bits)
    torch.testing.assert_close(centroids, (2 * torch.arange(2.0**bits).double() + 1) / 2**bits - 1, rtol=0, atol=1e-12)
    assert 3 * error == pytest.approx(4.0**-bits, rel=1e-12)


@pytest.mark.parametrize(("d", "centroid"), [(2, 2 / math.pi), (4, 4 / (3 * math.pi)), (5, 3 / 8)])
def test_one_bit_is_the_mean_absolute_value(d, centroid):
    assert lloyd_max_codebook(d, 1)[0][1].item() == pytest.approx(centroid, abs=1e-14)
    general = math.gamma(d / 2) / (math.sqrt(math.pi) * math.gamma((d + 1) / 2))
    assert centroid == pytest.approx(general)


@pytest.mark.parametrize("d", [2, 3, 12, 64, 80, 512, None])
@pytest.mark.parametrize("bits", range(1, 9))
def test_shape_and_bounds(d, bits):
    centroids, boundaries, error = lloyd_max_codebook(d, bits)
    assert centroids.shape == (2**bits,) and boundaries.shape == (2**bits - 1,)
    assert centroids.dtype == boundaries.dtype == torch.float64
    assert torch.equal(centroids, -centroids.flip(0))
    assert (centroids.diff() > 0).all()
    torch.testing.assert_close(boundaries, (centroids[1:] + centroids[:-1]) / 2, rtol=0, atol=1e-15)
    relative = (d or 1) * error
    assert relative < 2.7207 * 4.0**-bits
    if d != 2:  # where the lower bound, an asymptotic one, does not hold
        assert relative >= 4.0**-bits * (1 - 1e-12)


@pytest.mark.parametrize("bits", [4, 8])
def test_centroids_are_the_means_of_their_cells(bits):
    """By another sum: Simpson's rule over the density itself."""
    centroids, boundaries, _ = lloyd_max_codebook(64, bits)
    edges = torch.cat([boundaries[2 ** (bits - 1) - 1 :], torch.ones(1).double()])
    for i, centroid in enumerate(centroids[2 ** (bits - 1) :].tolist()):
        t = torch.linspace(edges[i].item(), edges[i + 1].item(), 20001, dtype=torch.float64)
        weights = torch.ones(20001, dtype=torch.float64)
        weights[1:-1:2], weights[2:-1:2] = 4, 2
        density = weights * (1 - t * t) ** 30.5
        assert centroid == pytest.approx(((t * density).sum() / density.sum()).item(), abs=1e-12)


def test_what_has_no_codebook():
    with pytest.raises(ValueError, match="d is 1"):
        lloyd_max_codebook(1, 4)
    for bits in (0, 9):
        with pytest.raises(ValueError, match=f"bits is {bits}"):
            lloyd_max_codebook(64, bits)


def test_computed_once():
    assert lloyd_max_codebook(64, 4)[0] is lloyd_max_codebook(64, 4)[0]
