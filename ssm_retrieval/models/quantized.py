"""Weights in 8 bits, for decoding on a CPU: half the memory of bfloat16, and half the bytes a token reads.

Each row of a matrix has a scale s and integers q of -127 .. 127, so that w = s q up to s / 2, which is the
row's largest weight / 254. A token at a time the integers are multiplied as they are
(`torch._weight_int8pack_mm`); of many tokens the matrix is written out in the activations' dtype first, which
then costs little.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssm_retrieval.models.common import LanguageModel
from ssm_retrieval.models.configuration import require
from ssm_retrieval.ops.linear import Linear

MULTIPLE = 32  # of columns, without which torch's kernel reads beyond the matrix
HAS_KERNEL = hasattr(torch, "_weight_int8pack_mm")  # private: an older or newer torch may lack it
FEW = 8  # rows of activations up to which the integers are multiplied as they are
LEAST = 0.2  # share of a block's largest matrix from which on a matrix is written in 8 bits


class Int8Linear(nn.Module):
    """An affine map x w^T + b with w = scale * quantized.

    Args:
        linear: The map that is replaced; its bias is kept as it is.

    Attributes:
        quantized: (N, K) int8, -127 .. 127.
        scale: (N,), in the dtype of the weights.
        bias: (N,) or None.
    """

    quantized: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach()
        scale = (weight.abs().amax(1).float() / 127).to(weight.dtype)
        # divided by the scale as it is kept; a row of zeros has scale 0
        steps = weight.float() / scale.float().clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        self.register_buffer("quantized", steps.round_().clamp_(-127, 127).to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    @property
    def weight(self) -> Tensor:
        """The matrix (N, K) in the dtype of the scale, written out anew at every access."""
        return self.quantized.to(self.dtype) * self.scale[:, None]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the activations."""
        return self.scale.dtype

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., K) to (..., N)."""
        rows = x.numel() // self.in_features
        differentiated = torch.is_grad_enabled() and x.requires_grad
        whole = HAS_KERNEL and self.in_features % MULTIPLE == 0
        whole = whole and x.device.type == "cpu" and x.dtype == self.dtype
        if 0 < rows <= FEW and whole and not differentiated:
            flat = x.reshape(rows, self.in_features)
            y = torch._weight_int8pack_mm(flat, self.quantized, self.scale).view(*x.shape[:-1], -1)
            return y if self.bias is None else y + self.bias
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """What the module's text says of it."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


@torch.no_grad()
def quantize(model: LanguageModel) -> LanguageModel:
    """Write the large matrices of a model in 8 bits, block by block; the old ones are freed as it goes.

    The embedding, norms, convolutions and small matrices, which steer the state (dt, B, C), stay as they are.
    The model is then for inference: gradients reach its inputs, not these matrices, and `models.save` refuses
    it.

    Args:
        model: The model, changed in place, with weights of bfloat16, float16 or float32.

    Returns:
        The model.

    Raises:
        UserError: If the model is in 8 bits already.
    """
    require(not is_quantized(model), "the model's weights are in 8 bits already; load it anew")
    for part in (*model.blocks, model):
        found = {
            (parent, name): child
            for parent in part.modules()
            for name, child in parent.named_children()
            if isinstance(child, Linear)
        }
        largest = max((child.weight.numel() for child in found.values()), default=0)
        for (parent, name), child in found.items():
            if child.weight.numel() >= LEAST * largest:
                setattr(parent, name, Int8Linear(child))
    return model.eval()


def is_quantized(model: nn.Module) -> bool:
    """Whether a model has weights in 8 bits."""
    return any(isinstance(module, Int8Linear) for module in model.modules())
