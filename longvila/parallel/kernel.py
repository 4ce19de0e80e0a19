"""One interface to block attention kernels: `(q, k, v, kind) -> (out, lse)`, and its backward.

The backward takes the log-sum-exp and output of the *whole* row, so that gradients of blocks add up to the exact
gradient (FlashAttention-2, Dao 2023, algorithm 2). Shapes are `(1, heads, tokens, head_dim)`; query heads are a
multiple of key/value heads. What the kinds of blocks mean is said in `blocks.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longvila.errors import ConfigError
from longvila.parallel.blocks import Kind
from longvila.parallel.traffic import count

aten = torch.ops.aten


def block_forward(q: Tensor, k: Tensor, v: Tensor, kind: Kind, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of one block.

    Args:
        q: (1, Hq, Tq, D); k, v: (1, Hkv, Tk, D).
        kind: `causal` and `edge` blocks are square.
        scale: factor of the scores.

    Returns:
        out (1, Hq, Tq, D) in the type of q, and lse (1, Hq, Tq) in fp32 (fp64 for fp64).

    Raises:
        ConfigError: on a GPU for a type other than bf16 and fp16, which flash attention does not take.
    """
    count("kernel forward")
    if kind == "edge":
        out, lse = _forward(q.flip(2), k.flip(2), v.flip(2), True, scale)
        return out.flip(2), lse.flip(2)
    return _forward(q, k, v, kind == "causal", scale)


def block_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, kind: Kind, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one block with respect to q, k and v, given `out` and `lse` of the whole row for these queries."""
    count("kernel backward")
    if kind == "edge":
        flipped = [x.flip(2) for x in (grad_out, q, k, v, out, lse)]
        dq, dk, dv = _backward(*flipped, causal=True, scale=scale)  # type: ignore[misc]
        return dq.flip(2), dk.flip(2), dv.flip(2)
    return _backward(grad_out, q, k, v, out, lse, kind == "causal", scale)


def _forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    _check_gpu_type(q)
    k, v = _repeat_heads(k, q), _repeat_heads(v, q)
    out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return out, lse


def _backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, q, k, v, out, lse, 0.0, causal, scale=scale
        )
    heads, seed = k.shape[1], torch.zeros((), dtype=torch.int64, device=q.device)
    dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
        grad_out.contiguous(), q, _repeat_heads(k, q), _repeat_heads(v, q), out.contiguous(), lse.contiguous(),
        None, None, q.shape[2], k.shape[2], 0.0, causal, seed, seed, scale=scale,
    )  # fmt: skip
    return dq, _sum_heads(dk, heads), _sum_heads(dv, heads)


def _check_gpu_type(q: Tensor) -> None:
    if q.dtype not in (torch.bfloat16, torch.float16):
        raise ConfigError(f"flash attention on a GPU takes bf16 or fp16, not {q.dtype}; set precision=bf16")


def _repeat_heads(x: Tensor, q: Tensor) -> Tensor:
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _sum_heads(grad: Tensor, heads: int) -> Tensor:
    return grad if grad.shape[1] == heads else grad.unflatten(1, (heads, -1)).sum(2)
