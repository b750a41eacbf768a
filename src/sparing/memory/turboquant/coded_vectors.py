"""Keys or values of one layer as codes, and which quantiser a policy gives them."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from sparing.config.codes import TurboQuant
from sparing.errors import CheckpointError
from sparing.kernels.code_layout import padded
from sparing.kernels.codes import decode_codes
from sparing.kernels.tied_codes import TurningChannels
from sparing.memory.turboquant.code_buffer import CodeBuffer
from sparing.memory.turboquant.quantisers import MseQuantiser, ProdQuantiser, Quantiser, SplitQuantiser, gaussian_sketch
from sparing.memory.turboquant.rotation import Rotation, make_rotation

__all__ = ["CodedVectors", "coded_vectors"]

LARGEST_FLOAT16 = 65504.0
ORTHOGONAL = 1e-3  # largest error of R R^T of a matrix that is given


class CodedVectors:
    """Keys or values of one layer as codes: a quantiser and a buffer for each of its streams."""

    def __init__(
        self,
        quantiser: Quantiser,
        heads: int,
        dims: list[int],
        role: str,
        scale_dtype: torch.dtype,
        device: torch.device,
    ):
        self.quantiser, self.role, self.scale_dtype = quantiser, role, scale_dtype
        self.streams = [
            CodeBuffer(heads, centroids, size, role, scale_dtype, device)
            for centroids, size in zip(quantiser.centroids, dims, strict=True)
        ]
        self._turning: tuple[Tensor | None, int, TurningChannels] | None = None

    def __len__(self) -> int:
        return len(self.streams[0])

    def append(self, x: Tensor) -> None:
        """x: [n, heads, d]."""
        for stream, encoded in zip(self.streams, self._encode(x), strict=True):
            stream.append(*encoded)

    def truncate(self, n: int) -> None:
        """Forget all but the first n entries, and with the last of them what was learnt from the first."""
        for stream in self.streams:
            stream.truncate(n)
        if n == 0:
            self.quantiser.forget()

    def keep(self, index: Tensor, before: Tensor, after: Tensor) -> None:
        """Hold the entries index [heads, m] of what `before` [n, heads, d], the codes and `after` are together."""
        pieces = zip(self._encode(before), self.streams, self._encode(after), strict=True)
        for first, stream, last in pieces:
            every = zip(first, stream.canonical(), last, strict=True)
            codes, scale = (torch.cat([a, b.to(a.dtype), c]) for a, b, c in every)
            order = index.T.to(codes.device)  # [m, heads]
            stream.truncate(0)
            stream.append(codes.gather(0, order[..., None].expand(-1, -1, codes.shape[2])), scale.gather(0, order))

    def decode(self, start: int, stop: int) -> Tensor:
        """float32 [heads, stop - start, d]; start: a multiple of 64."""
        return self.assemble([decode_codes(stream.codes, self.role, start, stop) for stream in self.streams])

    def project(self, q: Tensor) -> list[Tensor]:
        """Queries [T, heads, d] in the frame of each stream."""
        return self.quantiser.project(q)

    def assemble(self, parts: list[Tensor]) -> Tensor:
        """Decoded streams [heads, n, dims] -> vectors [heads, n, d]."""
        return self.quantiser.assemble([part.transpose(0, 1) for part in parts]).transpose(0, 1)

    def turning_channels(self, pairs: int) -> TurningChannels:
        """How the first `pairs` channels, at least, of each half come out of the frames."""
        chosen = self.quantiser.channels if isinstance(self.quantiser, SplitQuantiser) else None
        if self._turning is None or self._turning[0] is not chosen or self._turning[1] != pairs:
            factors = self.quantiser.factors() if isinstance(self.quantiser, MseQuantiser) else None
            found = None if factors is None else _by_factors(*factors, pairs)
            self._turning = chosen, pairs, found or self._by_products(pairs)
        return self._turning[2]

    def _by_products(self, pairs: int) -> TurningChannels:
        """As one matrix for each head: what the streams' unit vectors are assembled to."""
        heads = self.streams[0].heads if isinstance(self.quantiser, SplitQuantiser) else 1
        units, above = [], 0
        total = sum(padded(stream.dims) for stream in self.streams)
        for stream in self.streams:
            unit = torch.zeros(total, stream.dims, device=stream.centroids.device)
            unit[above : above + stream.dims].fill_diagonal_(1)
            units.append(unit[:, None].repeat(1, heads, 1))
            above += padded(stream.dims)
        vectors = self.quantiser.assemble(units).transpose(0, 1)  # [heads, total, d]
        right = vectors.unflatten(-1, (2, -1))[..., :pairs].flatten(-2).contiguous()
        return TurningChannels(right.new_ones(1, 1), right, right.new_ones(2 * pairs))

    @property
    def nbytes(self) -> int:
        channels = self.quantiser.channels if isinstance(self.quantiser, SplitQuantiser) else None
        return sum(stream.nbytes for stream in self.streams) + (0 if channels is None else channels.nbytes)

    def fork(self) -> CodedVectors:
        twin = object.__new__(CodedVectors)
        twin.role, twin.scale_dtype, twin.quantiser = self.role, self.scale_dtype, self.quantiser.fork()
        twin.streams, twin._turning = [stream.fork() for stream in self.streams], self._turning
        return twin

    def state(self) -> dict[str, Tensor]:
        found = dict(self.quantiser.state())
        for i, stream in enumerate(self.streams):
            found |= {f"{name}{i or ''}": tensor for name, tensor in stream.state().items()}
        return found

    def restore(self, state: dict[str, Tensor]) -> None:
        """Raises CheckpointError if the state was encoded with another rotation."""
        for name, mine in self.quantiser.state().items():
            if name == "channels":
                if state[name].numel() and isinstance(self.quantiser, SplitQuantiser):
                    self.quantiser.use(state[name])
            elif not torch.equal(mine.cpu(), state[name].cpu()):
                raise CheckpointError(f"{self.role}: saved with another rotation than this policy's")
        for i, stream in enumerate(self.streams):
            stream.restore(state[f"codes{i or ''}"], state[f"scale{i or ''}"])

    def _encode(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        if len(x) == 0:
            empty = [
                (x.new_zeros(0, s.heads, s.dims, dtype=torch.uint8), x.new_zeros(0, s.heads)) for s in self.streams
            ]
            return [(codes, scale.to(self.scale_dtype)) for codes, scale in empty]
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


def _by_factors(left: Tensor, right: Tensor, signs: Tensor, pairs: int) -> TurningChannels | None:
    """By the factors of a transform, if they cut vectors as kernels do: into whole sixteens, and halves into rows."""
    a, b = len(left), len(right)
    if a % 2 or a * b % 16:
        return None
    rows = torch.arange(-(-pairs // b))
    rows = torch.cat([rows, a // 2 + rows])
    return TurningChannels(left[rows].contiguous(), right[None], signs.view(a, b)[rows].flatten())


def coded_vectors(policy: TurboQuant, layer: int, role: str, heads: int, d: int, device: torch.device) -> CodedVectors:
    """Empty codes of one layer and role. Raises ValueError for explicit rotations that do not fit."""
    parts = policy.parts(d, role)
    quantisers = [_quantiser(policy, layer, role, channels, bits, part) for part, (channels, bits) in enumerate(parts)]
    quantiser = quantisers[0]
    if len(parts) == 2:
        sample = policy.block - policy.sink_tokens % policy.block  # what becomes codes first, however a text is cut
        quantiser = SplitQuantiser(quantisers[0], quantisers[1], parts[0][0], paired=role == "keys", sample=sample)
    dims = [stream.dims for stream in policy.streams(d, role)]
    return CodedVectors(quantiser, heads, dims, role, getattr(torch, policy.scale_dtype), device)


def _quantiser(policy: TurboQuant, layer: int, role: str, d: int, bits: int, part: int) -> Quantiser:
    seed = (policy.seed, layer, int(role == "values"), part)
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
