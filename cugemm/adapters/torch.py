"""What only torch itself can do for us: results whose gradient is an error in words."""

from __future__ import annotations

from typing import Any

import torch


class _WithoutBackward(torch.autograd.Function):
    """Identity that ties a finished result to the operands it came from, so that backward finds somebody to ask."""

    @staticmethod
    def forward(ctx: Any, name: str, result: Any, *operands: Any) -> Any:
        ctx.name = name
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(f"{ctx.name} has no backward; cugemm is for inference: call it under torch.no_grad(), or detach its operands.")


def without_backward(name: str, arrays: tuple[Any, ...], result: Any) -> Any:
    """`result` (a tensor or a tuple) such that backward through it raises; unchanged where no operand asks for gradients."""
    operands = [x for x in arrays if isinstance(x, torch.Tensor) and x.requires_grad]
    if not operands:
        return result
    if isinstance(result, tuple):
        return tuple(without_backward(name, arrays, part) for part in result)
    return _WithoutBackward.apply(name, result, *operands) if result.is_floating_point() else result
