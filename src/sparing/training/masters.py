"""Float32 parameters that multiply in fewer bits while they train: what stands in a model where a matrix stood."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparing.models.layers import Network

__all__ = ["BFloat16Training", "MasterWeight", "checkpoint_name", "replace_parameter", "use_bfloat16", "use_dense"]


class MasterWeight(nn.Module):
    """A matrix, or a stack of experts', with products of its own kind; `master` is the float32 parameter itself."""

    def __init__(self, master: nn.Parameter | Tensor):
        super().__init__()
        if isinstance(master, nn.Parameter):
            self.master = master
        else:
            self.__dict__["master"] = master  # a matrix of a stack: a view of the stack's parameter

    @property
    def shape(self) -> torch.Size:
        return self.master.shape

    def __len__(self) -> int:
        return len(self.master)

    def __getitem__(self, index: int) -> Self:
        return self.like(self.master[index])

    def like(self, master: Tensor) -> Self:
        """Another weight that multiplies as this one does."""
        return type(self)(master)

    def product(self, x: Tensor) -> Tensor:
        """`x @ master^T`, with gradients."""
        raise TypeError(f"{type(self).__name__} does not define product")

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = self.product(x)
        return y if bias is None else y + bias


class BFloat16Training(MasterWeight):
    """All three products of bfloat16 operands, summed in float32 and rounded to bfloat16."""

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x.bfloat16(), self.master.bfloat16())


def use_bfloat16(model: Network) -> None:
    """Let all matrices of a model that tokens are multiplied with do so in bfloat16, except those set to do otherwise.

    Embeddings, output head, router, convolution and vectors stay float32.
    """
    roles = model.roles()
    for name, parameter in list(model.named_parameters()):
        if checkpoint_name(name) == name and roles[name].is_matrix:
            replace_parameter(model, name, BFloat16Training(parameter))


def checkpoint_name(parameter: str) -> str:
    """Of the tensor that a parameter is, be it one of the model's own or a master."""
    return parameter.removesuffix(".master")


def use_dense(model: nn.Module) -> None:
    """Put every parameter back in its place, under its name of the checkpoint."""
    for name, module in list(model.named_modules()):
        if isinstance(module, MasterWeight):
            replace_parameter(model, name, module.master)


def replace_parameter(model: nn.Module, name: str, value: nn.Module | nn.Parameter) -> None:
    prefix, _, leaf = name.rpartition(".")
    parent = model.get_submodule(prefix)
    delattr(parent, leaf)
    setattr(parent, leaf, value)
