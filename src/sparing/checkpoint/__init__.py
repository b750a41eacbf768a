"""Checkpoints: reading them from a folder, a GGUF file or the hub, and writing them."""

from sparing.checkpoint.folder import Checkpoint
from sparing.checkpoint.source import open_checkpoint
from sparing.checkpoint.tensors import TensorSource
from sparing.checkpoint.write import save_safetensors, save_weights, write_config, write_json

__all__ = [
    "Checkpoint",
    "TensorSource",
    "open_checkpoint",
    "save_safetensors",
    "save_weights",
    "write_config",
    "write_json",
]
