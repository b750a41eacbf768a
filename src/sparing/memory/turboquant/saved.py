"""Whether what a file holds of codes is what a memory of its length would hold."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparing.config.memory import AttentionSpec
from sparing.kernels.code_layout import BLOCK

__all__ = ["check_codes"]


def check_codes(where: str, spec: AttentionSpec, found: Mapping[str, Tensor], length: int) -> int:
    """How many of a layer's entries are codes. found: its tensors, as `CodedLayers.state` names them.

    Raises ValueError unless they are those of a memory of `length` tokens.
    """
    assert spec.codes is not None
    total, sinks, coded = found["counts"].tolist()
    tail = len(found["v_tail"])
    if total != length or not 0 <= sinks <= spec.codes.sink_tokens or coded < 0:
        raise ValueError(f"{where}: counts {[total, sinks, coded]} do not fit a length of {length}")
    if spec.rounds is None and (
        sinks != spec.codes.sink_tokens or coded != length - spec.codes.exact(length) - min(length, sinks)
    ):
        raise ValueError(f"{where}: counts {[total, sinks, coded]} are not those of {length} tokens")
    if coded and tail < sinks:
        raise ValueError(f"{where}: counts tell of {sinks} first exact entries, {tail} are held")
    for name, tensor in found.items():
        kind = name.partition("_")[2].rstrip("0123456789")
        blocks = -(-coded // BLOCK)
        if (kind == "codes" and len(tensor) != blocks) or (kind == "scale" and len(tensor) != coded):
            raise ValueError(f"{where}: {name} holds {len(tensor)}, counts say {coded} entries are codes")
        if kind == "scale" and not tensor.isfinite().all():
            raise ValueError(f"{where}: {name} holds a scale that is not finite")
        if kind == "channels":
            _check_channels(where, spec, name, tensor, coded)
    return coded


def _check_channels(where: str, spec: AttentionSpec, name: str, tensor: Tensor, coded: int) -> None:
    assert spec.codes is not None
    if tensor.numel() == 0 and not coded:
        return
    (count, _), _ = spec.codes.split(spec.head_dim, "keys" if name.startswith("k") else "values")
    rises = tensor.ndim == 2 and (tensor.long().diff(dim=1) > 0).all()
    if tensor.dtype != torch.int16 or tensor.shape != (spec.num_key_value_heads, count) or not rises:
        raise ValueError(f"{where}: {name} {list(tensor.shape)} are not {count} rising channels of each head")
    if tensor.min() < 0 or tensor.max() >= spec.head_dim:
        raise ValueError(f"{where}: {name} are not all below {spec.head_dim}")
