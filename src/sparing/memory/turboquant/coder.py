"""How keys or values of one layer become codes, and which quantiser a policy gives them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparing.config.codes import TurboQuant
from sparing.errors import CheckpointError
from sparing.kernels.code_layout import padded
from sparing.kernels.codes import Codes, decode_codes
from sparing.kernels.tied_codes import TurningChannels
from sparing.memory.turboquant.quantisers import (
    Encoded,
    MseQuantiser,
    ProdQuantiser,
    Quantiser,
    SplitQuantiser,
    gaussian_sketch,
)
from sparing.memory.turboquant.rotation import Rotation, make_rotation

__all__ = ["Coder", "make_coder"]

LARGEST_FLOAT16 = 65504.0
ORTHOGONAL = 1e-3  # largest error of R R^T of a matrix that is given


class Coder:
    """How keys or values of one layer become codes and come back. Never changes: `learnt` gives another.

    role: "keys" or "values"; dims: of each part of the quantiser.
    """

    def __init__(
        self,
        quantiser: Quantiser,
        heads: int,
        dims: Sequence[int],
        role: str,
        scale_dtype: torch.dtype,
        device: torch.device,
    ):
        self.quantiser, self.heads, self.dims, self.role = quantiser, heads, tuple(dims), role
        self.scale_dtype, self.device = scale_dtype, device
        self.centroids = [centroids.to(device) for centroids in quantiser.centroids]
        self._turning: dict[int, TurningChannels] = {}

    @property
    def bits(self) -> list[int]:
        """Of a code of each part."""
        return [len(centroids).bit_length() - 1 for centroids in self.centroids]

    @property
    def channels(self) -> Tensor | None:
        """What was learnt from data: int16 [heads, count] channels that stand out."""
        return self.quantiser.channels if isinstance(self.quantiser, SplitQuantiser) else None

    def learnt(self, x: Tensor) -> Coder:
        """One that learnt from the first vectors [n, heads, d]; itself where nothing is left to learn."""
        return self._with(self.quantiser.learnt(x.float()))

    def encode(self, x: Tensor) -> list[Encoded]:
        """Codes uint8 [n, heads, dims] and scales [n, heads] of each part. x: [n, heads, d]."""
        if len(x) == 0:
            empty = x.new_zeros(0, self.heads, dtype=self.scale_dtype)
            return [(x.new_zeros(0, self.heads, dims, dtype=torch.uint8), empty) for dims in self.dims]
        encoded = self.quantiser.encode(x.float().contiguous())
        if self.scale_dtype == torch.float16:
            if any((scale > LARGEST_FLOAT16).any() for _, scale in encoded):
                warnings.warn(
                    f"turboquant: a scale of {self.role} exceeds float16 and was cut to {LARGEST_FLOAT16:g}:"
                    " use scale_dtype='float32'",
                    stacklevel=2,
                )
            encoded = [(codes, scale.clamp_max(LARGEST_FLOAT16)) for codes, scale in encoded]
        return [(codes, scale.to(self.scale_dtype)) for codes, scale in encoded]

    def decode(self, parts: Sequence[Codes], start: int, stop: int) -> Tensor:
        """float32 [heads, stop - start, d]; start: a multiple of 64."""
        return self.assemble([decode_codes(part, self.role, start, stop) for part in parts])

    def project(self, q: Tensor) -> list[Tensor]:
        """Queries [T, heads, d] in the frame of each part."""
        return self.quantiser.project(q)

    def assemble(self, parts: list[Tensor]) -> Tensor:
        """Decoded parts [heads, n, dims] -> vectors [heads, n, d]."""
        return self.quantiser.assemble([part.transpose(0, 1) for part in parts]).transpose(0, 1)

    def turning_channels(self, pairs: int) -> TurningChannels:
        """How the first `pairs` channels, at least, of each half come out of the frames."""
        if pairs not in self._turning:
            factors = self.quantiser.factors() if isinstance(self.quantiser, MseQuantiser) else None
            found = None if factors is None else _by_factors(*factors, pairs)
            self._turning[pairs] = found or self._by_products(pairs)
        return self._turning[pairs]

    def _by_products(self, pairs: int) -> TurningChannels:
        """As one matrix for each head: what the parts' unit vectors are assembled to."""
        heads = self.heads if isinstance(self.quantiser, SplitQuantiser) else 1
        units, above = [], 0
        total = sum(map(padded, self.dims))
        for dims in self.dims:
            unit = torch.zeros(total, dims, device=self.device)
            unit[above : above + dims].fill_diagonal_(1)
            units.append(unit[:, None].repeat(1, heads, 1))
            above += padded(dims)
        vectors = self.quantiser.assemble(units).transpose(0, 1)  # [heads, total, d]
        right = vectors.unflatten(-1, (2, -1))[..., :pairs].flatten(-2).contiguous()
        return TurningChannels(right.new_ones(1, 1), right, right.new_ones(2 * pairs))

    def state(self) -> dict[str, Tensor]:
        """What identifies the frames, and what was learnt from data."""
        return self.quantiser.state()

    def restored(self, state: Mapping[str, Tensor]) -> Coder:
        """One that learnt what `state` says. Raises CheckpointError if that was of another rotation."""
        found = self.quantiser
        for name, mine in found.state().items():
            if name == "channels":
                if state[name].numel() and isinstance(found, SplitQuantiser):
                    found = found.using(state[name].to(self.device))
            elif not torch.equal(mine.cpu(), state[name].cpu()):
                raise CheckpointError(f"{self.role}: saved with another rotation than this policy's")
        return self._with(found)

    def _with(self, quantiser: Quantiser) -> Coder:
        if quantiser is self.quantiser:
            return self
        return Coder(quantiser, self.heads, self.dims, self.role, self.scale_dtype, self.device)


def _by_factors(left: Tensor, right: Tensor, signs: Tensor, pairs: int) -> TurningChannels | None:
    """By the factors of a transform, if they cut vectors as kernels do: into whole sixteens, and halves into rows."""
    a, b = len(left), len(right)
    if a % 2 or a * b % 16:
        return None
    rows = torch.arange(-(-pairs // b))
    rows = torch.cat([rows, a // 2 + rows])
    return TurningChannels(left[rows].contiguous(), right[None], signs.view(a, b)[rows].flatten())


def make_coder(policy: TurboQuant, layer: int, role: str, heads: int, d: int, device: torch.device) -> Coder:
    """Of one layer and role. Raises ValueError for explicit rotations that do not fit."""
    split = policy.split(d, role)
    quantisers = [_quantiser(policy, layer, role, channels, bits, half) for half, (channels, bits) in enumerate(split)]
    quantiser = quantisers[0]
    if len(split) == 2:
        sample = policy.block - policy.sink_tokens % policy.block  # what becomes codes first, however a text is cut
        quantiser = SplitQuantiser(quantisers[0], quantisers[1], split[0][0], paired=role == "keys", sample=sample)
    dims = [part.dims for part in policy.parts(d, role)]
    return Coder(quantiser, heads, dims, role, getattr(torch, policy.scale_dtype), device)


def _quantiser(policy: TurboQuant, layer: int, role: str, d: int, bits: int, half: int) -> Quantiser:
    seed = (policy.seed, layer, int(role == "values"), half)
    if isinstance(policy.rotation, str):
        rotation = make_rotation(policy.rotation, d, *seed)
    else:
        rotation = _explicit(policy.rotation, layer, role, d)
    if policy.variant == "prod":
        return ProdQuantiser(rotation, gaussian_sketch(d, *seed, 1), bits)
    return MseQuantiser(rotation, bits, policy.scale)


def _explicit(pair: tuple[Tensor, Tensor], layer: int, role: str, d: int) -> Rotation:
    """The matrix [d, d] of a layer and role in a pair (keys, values) of one matrix per layer."""
    where = f"turboquant: the rotation of layer {layer}'s {role}"
    try:
        matrix = torch.as_tensor(pair[role == "values"][layer])
        is_real = not matrix.is_complex() and matrix.dtype != torch.bool
    except IndexError:
        raise ValueError(f"{where} is missing: give one [{d}, {d}] matrix for each layer") from None
    except (TypeError, ValueError, RuntimeError, KeyError):
        raise ValueError(f"{where} is not a tensor: give one [{d}, {d}] matrix for each layer") from None
    if matrix.shape != (d, d) or not is_real:
        raise ValueError(f"{where} is {matrix.dtype} {list(matrix.shape)}, not a real matrix [{d}, {d}]")
    matrix = matrix.float()
    if not matrix.isfinite().all():
        raise ValueError(f"{where} holds numbers that are not finite")
    error = float((matrix @ matrix.T - torch.eye(d, device=matrix.device)).abs().max())
    if error > ORTHOGONAL:
        raise ValueError(
            f"turboquant: the rotation of layer {layer}'s {role} is not orthogonal (R R^T is off by {error:.2g})"
        )
    return Rotation(d, matrix=matrix)
