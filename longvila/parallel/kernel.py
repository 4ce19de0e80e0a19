"""One interface to block attention kernels: `(q, k, v, kind) -> (out, lse)`, and its backward.

The backward takes the log-sum-exp and output of the *whole* row, so that gradients of blocks add up to the exact
gradient (FlashAttention-2, Dao 2023, algorithm 2). Shapes are `(1, heads, tokens, head_dim)`; query heads are a
multiple of key/value heads. What the kinds of blocks mean is said in `blocks.py`.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from longvila.errors import ConfigError
from longvila.parallel.blocks import Block, Kind, halve_squares
from longvila.parallel.traffic import count

aten = torch.ops.aten

FLASH_4_DIMS = (64, 128)
"""Head dims that go to FlashAttention 4: those whose gradients were seen to be right on a GPU. Of several squares in
one launch, version 4.0.0b36 gives wrong ones at 16, without an error. All others go to torch's FlashAttention 2."""


CPU_LEAF = 128
"""Tokens of the largest square that a CPU takes as one. Torch's kernel goes through 256 queries x 512 keys at a time
and leaves out only what lies wholly beyond the diagonal: a quarter more than is seen of a square of 2,048 tokens, by
halves a sixteenth. Further cuts cost what they save."""


def kernel_blocks(block: Block, device: torch.device) -> list[Block]:
    """The blocks to compute instead of one, each in a call of its own, for a device's kernel to be at its best: on a
    GPU, the block as it is; on a CPU, squares one by one and cut by halves."""
    return [block] if device.type == "cuda" else halve_squares(block, CPU_LEAF)


def block_forward(
    q: Tensor, k: Tensor, v: Tensor, kind: Kind, scale: float, cuts: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor]:
    """Attention of one block.

    Args:
        q: (1, Hq, Tq, D); k, v: (1, Hkv, Tk, D).
        kind: `causal` and `edge` blocks are square.
        scale: factor of the scores.
        cuts: of several `causal` squares end to end, where each begins, from 0, and where the last ends. On a GPU
            alone, which takes them all in one launch (`kernel_blocks`).

    Returns:
        out (1, Hq, Tq, D) in the type of q, and lse (1, Hq, Tq) in fp32 (fp64 for fp64).

    Raises:
        ConfigError: on a GPU for what flash attention does not take: types other than bf16 and fp16, and head dims
            above 256 or not a multiple of 8.
    """
    if kind == "edge":
        out, lse = _forward(q.flip(2), k.flip(2), v.flip(2), True, scale, ())
        return out.flip(2), lse.flip(2)
    return _forward(q, k, v, kind == "causal", scale, cuts)


def block_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, kind: Kind, scale: float,
    cuts: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of one block with respect to q, k and v, given `out` and `lse` of the whole row for these queries."""
    tensors = (grad_out, q, k, v, out, lse)
    if kind == "edge":
        dq, dk, dv = _backward(tuple(x.flip(2) for x in tensors), True, scale, ())
        return dq.flip(2), dk.flip(2), dv.flip(2)
    return _backward(tensors, kind == "causal", scale, cuts)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, cuts: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    count("kernel forward")
    if q.device.type == "cuda":
        return _cuda_forward(q, k, v, causal, scale, cuts)
    assert not cuts, "kernel_blocks gives a CPU its squares one by one"
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def _backward(
    tensors: tuple[Tensor, ...], causal: bool, scale: float, cuts: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    count("kernel backward")
    if tensors[0].device.type == "cuda":
        return _cuda_backward(*tensors, causal=causal, scale=scale, cuts=cuts)  # type: ignore[misc]
    assert not cuts, "kernel_blocks gives a CPU its squares one by one"
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(*tensors, 0.0, causal, scale=scale)


def _cuda_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, cuts: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    dim = q.shape[3]
    if q.dtype not in (torch.bfloat16, torch.float16):
        raise ConfigError(f"flash attention on a GPU takes bf16 or fp16, not {q.dtype}; set precision=bf16")
    if dim % 8 or dim > 256:
        raise ConfigError(f"flash attention on a GPU takes head dims that are multiples of 8 up to 256, not {dim}")
    ends, longest = _ends(cuts, q, k)
    inputs = [_tokens_first(x, cuts) for x in (q, k, v)]
    if (four := flash_attention_4()) and dim in FLASH_4_DIMS:
        out, lse, *_ = four._flash_attn_fwd(
            *inputs, softmax_scale=scale, causal=causal, cu_seqlens_q=ends, cu_seqlens_k=ends,
            max_seqlen_q=longest[0], max_seqlen_k=longest[1], return_lse=True,
        )  # fmt: skip
    else:
        out, lse, *_ = aten._flash_attention_forward(*inputs, ends, ends, *longest, 0.0, causal, False, scale=scale)
    return _heads_first(out, cuts), lse.view(1, q.shape[1], q.shape[2])


def _cuda_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    causal: bool, scale: float, cuts: tuple[int, ...],
) -> tuple[Tensor, ...]:  # fmt: skip
    ends, longest = _ends(cuts, q, k)
    grad_out, q, k, v, out = (_tokens_first(x, cuts) for x in (grad_out, q, k, v, out))
    lse = (lse[0] if cuts else lse).contiguous()
    if (four := flash_attention_4()) and q.shape[-1] in FLASH_4_DIMS:
        grads = four._flash_attn_bwd(
            q, k, v, out.contiguous(), grad_out.contiguous(), lse, softmax_scale=scale, causal=causal,
            cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=longest[0], max_seqlen_k=longest[1],
        )  # fmt: skip
    else:
        seed = torch.zeros((), dtype=torch.int64, device=q.device)
        grads = aten._flash_attention_backward(
            grad_out, q, k, v, out, lse, ends, ends, *longest, 0.0, causal, seed, seed, scale=scale
        )
    return tuple(_heads_first(grad, cuts) for grad in grads[:3])


@lru_cache(maxsize=1)
def flash_attention_4() -> Any:
    """FlashAttention 4's kernels, where its package is installed and the GPU is a Hopper or a Blackwell; else None.

    Called by the names by which torch.nn.attention calls them: those that return and take the log-sum-exp.

    Raises:
        ConfigError: it is installed, and broken.
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] not in (9, 10):
        return None
    if not find_spec("flash_attn") or not find_spec("flash_attn.cute"):
        return None
    try:
        return import_module("flash_attn.cute.interface")
    except Exception as error:  # what it builds on raises what it likes
        raise ConfigError(
            f"FlashAttention 4 is installed and cannot be imported ({type(error).__name__}: {error}); install it again "
            f"with its CUDA 13 parts (pip install 'longvila[gpu]'), or remove flash-attn-4"
        ) from error


def _ends(cuts: tuple[int, ...], q: Tensor, k: Tensor) -> tuple[Tensor | None, tuple[int, int]]:
    """FlashAttention's cumulative lengths and its longest of queries and keys."""
    if not cuts:
        return None, (q.shape[2], k.shape[2])
    longest = max(stop - start for start, stop in pairwise(cuts))
    return _on_device(cuts, q.device), (longest, longest)


@lru_cache(maxsize=64)
def _on_device(cuts: tuple[int, ...], device: torch.device) -> Tensor:
    """Kept, since every layer asks for them again."""
    return torch.tensor(cuts, dtype=torch.int32, device=device)


def _tokens_first(x: Tensor, cuts: tuple[int, ...]) -> Tensor:
    """(1, H, T, D) -> (1, T, H, D), or (T, H, D) of several squares: FlashAttention's order, without a copy."""
    return x[0].transpose(0, 1) if cuts else x.transpose(1, 2)


def _heads_first(x: Tensor, cuts: tuple[int, ...]) -> Tensor:
    return x.transpose(0, 1)[None] if cuts else x.transpose(1, 2)
