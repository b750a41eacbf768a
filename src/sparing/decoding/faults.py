"""Logits that are not finite never become a token: which row they are of, and where they arose."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparing.memory.sequence import Memory
from sparing.models.base import LanguageModel
from sparing.models.batch import RaggedBatch, Row

__all__ = ["origin", "refuse"]


def refuse(
    model: LanguageModel, row: int, tokens: Tensor, memory: Memory, logits: Tensor, changed: Tensor
) -> ValueError:
    """The error for a row from which no token can be chosen, to be raised once its memory is as before the pass.

    tokens: int64 [n], what the pass added; logits: [V] of its last token; changed: [V], those logits as processed.
    """
    place = f"row {row}, after {memory.length + len(tokens)} tokens"
    if logits.amax().isfinite():
        if changed.isnan().any() or changed.isposinf().any():
            return ValueError(f"{place}: the settings of sampling make logits overflow, use milder ones")
        return ValueError(
            f"{place}: no token is left to choose, the settings (suppress_tokens, bad_words_ids, logit_bias ...)"
            " forbid them all"
        )
    found = "NaN" if logits.isnan().any() else "infinity" if logits.isposinf().any() else "nothing but -infinity"
    where = origin(lambda trace: model.forward(RaggedBatch([Row(tokens, memory)]), trace), [memory])
    return ValueError(f"{place}: the logits hold {found}, {where}: no token was chosen")


@torch.inference_mode()
def origin(forward: Callable[[list[Tensor]], Tensor], memories: Sequence[Memory]) -> str:
    """Words for the first stage of a pass whose output is not finite. forward: runs it once more, filling a trace.

    Memories are as they were afterwards.
    """
    trace: list[Tensor] = []
    try:
        forward(trace)
    except Exception:  # what went wrong is known already, this only says where
        return "of unknown origin"
    finally:
        for memory in memories:
            memory.rollback()
    bad = next((i for i, states in enumerate(trace) if not states.isfinite().all()), None)
    if bad is None:
        return "which the final norm or the output head made"
    return "first in the embeddings" if bad == 0 else f"first in the output of layer {bad - 1}"
