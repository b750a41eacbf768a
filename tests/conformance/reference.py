"""Tiny random models of transformers, saved as checkpoints: the other side of every comparison here."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import sparing
from sparing.kernels import dispatch, products
from tests.tiny import autoregressive_scale, randomise


def save_random(
    model_class: Any,
    config: Any,
    folder: Path,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    scale: Callable[[str, Tensor, Tensor], Tensor] = autoregressive_scale,
) -> Any:
    """Build a transformers model, randomise it, save it with save_pretrained, and return it ready for inference.

    The returned model attends eagerly and computes in `dtype`, the type of the saved file.
    """
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = model_class(config).eval()
    randomise(model, seed, scale)
    model.to(dtype).save_pretrained(folder)
    # `to` also rounds the rotary constants of a reference model; loading keeps them in float32.
    return model if dtype == torch.float32 else reload(model_class, folder, dtype)


def reload(model_class: Any, folder: Path, dtype: torch.dtype) -> Any:
    """The reference model of a saved checkpoint in another type, with the experts' default implementation."""
    return model_class.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def rewrite(
    folder: Path,
    config: Callable[[dict[str, Any]], None] = lambda config: None,
    tensors: Callable[[dict[str, Tensor]], Mapping[str, Tensor]] = lambda tensors: tensors,
) -> None:
    """Change a saved checkpoint in place: its config.json, its tensors, or both."""
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    config(raw)
    path.write_text(json.dumps(raw))
    weights = folder / "model.safetensors"
    save_file(dict(tensors(load_file(weights))), weights, metadata={"format": "pt"})


def multiply_as_torch_does(monkeypatch: Any) -> None:
    """Turn off our own ways to multiply: bits are then comparable."""
    monkeypatch.setattr(products, "_has_arithmetic", lambda dtype: True)
    monkeypatch.setattr(dispatch, "_active", dispatch.REFERENCE)


def load(folder: Path, dtype: str = "auto") -> Any:
    """Our model of a saved checkpoint."""
    return sparing.load(folder, dtype=dtype, device="cpu")


@torch.no_grad()
def run_reference(model: Any, tokens: Tensor, **options: Any) -> Any:
    """One uncached forward of a transformers model over a single sequence [T]."""
    return model(input_ids=tokens[None], use_cache=False, output_hidden_states=True, **options)


def run_chunked(model: Any, tokens: Tensor, chunks: list[int]) -> Tensor:
    """Our logits [T, V] with the sequence fed chunk by chunk into one memory."""
    memory = model.memory()
    return torch.cat([model.logits(chunk, memory) for chunk in tokens.split(chunks)])


def assert_same(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Largest absolute difference within tolerance; shapes equal; nothing but numbers."""
    assert ours.shape == theirs.shape
    assert torch.isfinite(theirs).all()
    difference = (ours.float() - theirs.float()).abs().max().item()
    assert difference <= tolerance, f"largest difference {difference:.3g}, tolerance {tolerance:.3g}"
