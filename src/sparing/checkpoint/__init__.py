"""Checkpoints: reading them from a folder, a GGUF file or the hub, and writing them."""

from sparing.checkpoint.source import Checkpoint, open_checkpoint
from sparing.checkpoint.tensors import TensorSource
from sparing.checkpoint.write import save_safetensors, save_weights, write_config, write_json
from sparing.weights.load import load_weights

__all__ = [
    "Checkpoint",
    "TensorSource",
    "load_weights",
    "open_checkpoint",
    "save_safetensors",
    "save_weights",
    "write_config",
    "write_json",
]
