"""Exact attention over a fold: the executor of a plan.

What a rank brings to attention is `(1, heads, tokens of its tensor group, head_dim)`. `FoldedPlan.attend` moves it in
three steps:

1. heads (`heads` group): one all-to-all carries q, k and v, so that each rank holds some heads of all tokens of its
   context rank (DeepSpeed-Ulysses, Jacobs et al. 2023; the head axis of LoongTrain's 2D-Attention);
2. context: this rank's program is run step by step. Transfers are posted ahead, each step waits for its own inputs
   alone, and partial outputs are merged by their log-sum-exp (Ring Attention, Liu et al. 2023);
3. heads back: the reverse all-to-all.

Partial outputs, log-sum-exps and gradients are accumulated in fp32 (fp64 for fp64 inputs): in bf16 they would cost more
accuracy than the kernel itself.

All three are torch operators (`torch.ops.longvila.*`), so that activation checkpointing can keep what they return, and
`torch.compile` passes over them. Operators take numbers and tensors only: a plan goes by its handle.
"""

from __future__ import annotations

import itertools
import weakref
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from longvila.errors import ConfigError
from longvila.parallel.blocks import Block, Mask, Span
from longvila.parallel.exchange import all_to_all
from longvila.parallel.fold import Fold
from longvila.parallel.kernel import block_backward, block_forward, kernel_blocks
from longvila.parallel.messages import Fetches, Held, Returns
from longvila.parallel.plan import Plan, Program, Step
from longvila.parallel.traffic import timed

_handles = itertools.count()
_by_handle: weakref.WeakValueDictionary[int, FoldedPlan] = weakref.WeakValueDictionary()


class FoldedPlan:
    """A plan bound to this rank's fold. Travels to every attention layer as the keyword argument `plan`.

    Not a dataclass: FSDP2 walks through dataclasses among the arguments of every layer, and a plan has thousands of
    entries.
    """

    def __init__(self, plan: Plan, fold: Fold) -> None:
        self.plan = plan
        self.fold = fold
        self.handle = next(_handles)
        self.tensor_tokens = plan.tensor_tokens(fold.part, fold.head)
        """Tokens outside attention of each rank of this rank's tensor group."""
        self.num_tokens = sum(self.tensor_tokens)
        """Tokens that this rank brings to attention: those of its tensor group."""
        self.longest = max(plan.lengths)
        """Tokens of the longest document."""
        _by_handle[self.handle] = self

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Mask = Mask(), layer: int = -1) -> Tensor:
        """Attention within each document of the row.

        Args:
            q: (1, Hq, t, D), k and v: (1, Hkv, t, D), with t `num_tokens`; Hq, a multiple of Hkv, and Hkv those of
                this rank of its tensor group.
            scale: factor of the scores.
            mask: which keys of its document a query sees.
            layer: number of the layer that asks; activation checkpointing keeps the results of some.

        Returns:
            (1, Hq, t, D). Differentiable in q, k and v.

        Raises:
            ConfigError: for shapes or types that do not fit together, or a head axis longer than Hq.
        """
        self._check(q, k, v)
        num_ranks = self.fold.num_heads
        if num_ranks == 1:
            return self._context(q, k, v, scale, mask, layer)
        ranges = head_ranges(q.shape[1], num_ranks)
        tokens = self.plan.rank_tokens(self.fold.part)
        q, k, v = self._scatter_heads(q, k, v, ranges, tokens, layer)
        return self._gather_heads(self._context(q, k, v, scale, mask, layer), ranges, tokens, layer)

    def _context(self, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Mask, layer: int) -> Tensor:
        return _context_attention(q, k, v, self.handle, scale, mask.causal, mask.window, layer)[0]

    def _check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        if not (q.shape[2] == k.shape[2] == v.shape[2] == self.num_tokens) or q.shape[0] != 1:
            raise ConfigError(
                f"the plan gives this rank 1 x {self.num_tokens} tokens, but q, k, v have {q.shape[0]} x {q.shape[2]}, "
                f"{k.shape[2]} and {v.shape[2]}"
            )
        check_heads(q, k, v)
        if self.fold.num_heads > q.shape[1]:
            raise ConfigError(
                f"a head axis of {self.fold.num_heads} ranks leaves ranks without one of the {q.shape[1]} query heads; "
                f"use parallel.head <= {q.shape[1]}"
            )

    def _scatter_heads(
        self, q: Tensor, k: Tensor, v: Tensor, ranges: list[Span], tokens: Sequence[int], layer: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All heads of my tokens -> my heads of all tokens of the context rank."""
        dim, group = q.shape[3], q.shape[1] // k.shape[1]
        kv_ranges = [key_heads(span, group) for span in ranges]
        pieces, in_splits = [], []
        for (q0, q1), (k0, k1) in zip(ranges, kv_ranges, strict=True):
            piece = torch.cat([q[0, q0:q1], k[0, k0:k1], v[0, k0:k1]]).flatten()
            pieces.append(piece)
            in_splits.append(piece.numel())
        (q0, q1), (k0, k1) = ranges[self.fold.head], kv_ranges[self.fold.head]
        num_q, num_kv = q1 - q0, k1 - k0
        out_splits = [(num_q + 2 * num_kv) * count * dim for count in tokens]
        received = all_to_all(torch.cat(pieces), in_splits, out_splits, self.fold.heads, "heads", layer)
        by_rank = [
            piece.view(num_q + 2 * num_kv, count, dim)
            for piece, count in zip(received.split(out_splits), tokens, strict=True)
        ]
        q, k, v = torch.cat(by_rank, dim=1).unsqueeze(0).split([num_q, num_kv, num_kv], dim=1)
        if num_q % num_kv or any((q0 + i) // group - k0 != i // (num_q // num_kv) for i in range(num_q)):
            # The cut goes through a group of query heads: give each query head its own key head, after the exchange.
            of_query = torch.tensor([(q0 + i) // group - k0 for i in range(num_q)], device=q.device)
            k, v = k.index_select(1, of_query), v.index_select(1, of_query)
        return q, k, v

    def _gather_heads(self, out: Tensor, ranges: list[Span], tokens: Sequence[int], layer: int) -> Tensor:
        """My heads of all tokens of the context rank -> all heads of my tokens."""
        mine, dim = tokens[self.fold.head], out.shape[3]
        pieces = [piece.flatten() for piece in out[0].split(list(tokens), dim=1)]
        out_splits = [(stop - start) * mine * dim for start, stop in ranges]
        received = all_to_all(
            torch.cat(pieces), [p.numel() for p in pieces], out_splits, self.fold.heads, "heads", layer
        )
        return received.view(1, ranges[-1][1], mine, dim)


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises ConfigError where types, numbers or dims of the heads of q (1, Hq, t, D), k and v do not fit together."""
    if not q.dtype == k.dtype == v.dtype:
        raise ConfigError(f"q, k and v must have one type, not {q.dtype}, {k.dtype} and {v.dtype}")
    if q.shape[1] % k.shape[1] or k.shape[1] != v.shape[1]:
        raise ConfigError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key and {v.shape[1]} value heads")
    if q.shape[3] != v.shape[3]:
        raise ConfigError(f"head dims of queries ({q.shape[3]}) and values ({v.shape[3]}) must be equal")


def head_ranges(heads: int, ranks: int) -> list[Span]:
    """Query heads of each head rank; where they do not divide, some ranks have one more."""
    return [(heads * rank // ranks, heads * (rank + 1) // ranks) for rank in range(ranks)]


def key_heads(query_heads: Span, group: int) -> Span:
    """Key/value heads that a range of query heads reads, with `group` query heads to each."""
    return query_heads[0] // group, (query_heads[1] - 1) // group + 1


@torch.library.custom_op("longvila::context_attention", mutates_args=())
def _context_attention(
    q: Tensor, k: Tensor, v: Tensor, handle: int, scale: float, causal: bool, window: int | None, layer: int
) -> tuple[Tensor, Tensor]:
    """Step 2: attention of the heads at hand over all context ranks. Returns out, and lse in the accumulation type."""
    folded = _by_handle[handle]
    program = folded.plan.program(folded.fold.part, Mask(causal, window))
    if block := _only_block(program, q.device):  # nothing to add up: no sums in fp32, no passes over them
        out, lse = block_forward(q, k, v, block.kind, scale, block.cuts)
        return out.contiguous(), lse.contiguous()
    held: Held = {("keys", program.rank): (k, v), ("queries", program.rank): (q,)}
    mine = answer_totals(q)
    answers = Returns(program, "queries", folded.fold.return_links, mine.tensors, _merge)
    fetches = Fetches(program, folded.fold.links, held)
    for index in program.indices:
        fetches.move(index)
        for step in program.steps_at(index):
            if step.cargo == "keys":
                (queries,), (keys, values), answer = (q,), held["keys", step.owner], mine
            else:
                (queries,), (keys, values) = held["queries", step.owner], (k, v)
                answer = answer_totals(queries)
                answers.open(step.owner, answer.tensors)
            with timed(f"ns step {index}"):
                for block in _blocks(step, q.device):
                    rows, columns = slice(*block.q), slice(*block.k)
                    part = block_forward(
                        queries[:, :, rows], keys[:, :, columns], values[:, :, columns], block.kind, scale, block.cuts
                    )
                    answer.add(block.q, part)
            if answer is not mine:
                answer.close()
        fetches.release(index)
        answers.move(index)
    fetches.finish()
    mine.close()
    answers.finish()
    out, lse = mine.tensors
    return out.to(q.dtype), lse


@_context_attention.register_fake
def _(q, k, v, handle, scale, causal, window, layer):
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:3], dtype=_exact(q.dtype))


@torch.library.custom_op("longvila::context_attention_backward", mutates_args=())
def _context_attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    handle: int, scale: float, causal: bool, window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    folded = _by_handle[handle]
    program = folded.plan.program(folded.fold.part, Mask(causal, window))
    if block := _only_block(program, q.device):
        dq, dk, dv = block_backward(grad_out, q, k, v, out, lse, block.kind, scale, block.cuts)
        return dq.contiguous(), dk.contiguous(), dv.contiguous()
    held: Held = {("keys", program.rank): (k, v), ("queries", program.rank): (grad_out, q, out, lse)}
    my_queries, my_keys = _sums(lse.dtype, q), _sums(lse.dtype, k, v)
    key_returns = Returns(program, "keys", folded.fold.return_links, my_keys.tensors, _add)
    query_returns = Returns(program, "queries", folded.fold.return_links, my_queries.tensors, _add)
    fetches = Fetches(program, folded.fold.links, held)
    for index in program.indices:
        fetches.move(index)
        for step in program.steps_at(index):
            grads, queries, outs, lses = held["queries", program.rank if step.cargo == "keys" else step.owner]
            keys, values = held["keys", step.owner if step.cargo == "keys" else program.rank]
            of_queries, of_keys = my_queries, my_keys
            if step.cargo == "queries":
                of_queries = _sums(lse.dtype, queries)
                query_returns.open(step.owner, of_queries.tensors)
            elif step.owner != program.rank:
                of_keys = _sums(lse.dtype, keys, values)
                key_returns.open(step.owner, of_keys.tensors)
            for block in _blocks(step, q.device):
                rows, columns = slice(*block.q), slice(*block.k)
                parts = block_backward(
                    grads[:, :, rows], queries[:, :, rows], keys[:, :, columns], values[:, :, columns],
                    outs[:, :, rows], lses[:, :, rows], block.kind, scale, block.cuts,
                )  # fmt: skip
                of_queries.add(block.q, parts[:1])
                of_keys.add(block.k, parts[1:])
            for sums in (of_queries, of_keys):
                if sums not in (my_queries, my_keys):
                    sums.close()
        fetches.release(index)
        key_returns.move(index)
        query_returns.move(index)
    fetches.finish()
    my_queries.close()
    my_keys.close()
    key_returns.finish()
    query_returns.finish()
    (dq,), (dk, dv) = my_queries.tensors, my_keys.tensors
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


@_context_attention_backward.register_fake
def _(grad_out, q, k, v, out, lse, handle, scale, causal, window):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _setup(ctx, inputs, output) -> None:
    q, k, v, ctx.handle, ctx.scale, ctx.causal, ctx.window, _ = inputs
    ctx.save_for_backward(q, k, v, *output)
    if isinstance(ctx.handle, int):  # a number of a traced graph is none; there the caller's batch keeps the plan alive
        ctx.folded = _by_handle.get(ctx.handle)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_out: Tensor, _grad_lse):
    grads = _context_attention_backward(grad_out, *ctx.saved_tensors, ctx.handle, ctx.scale, ctx.causal, ctx.window)
    return *grads, None, None, None, None, None


_context_attention.register_autograd(_backward, setup_context=_setup)


def _blocks(step: Step, device: torch.device) -> list[Block]:
    """A kernel call each."""
    return [block for launch in step.launches for block in kernel_blocks(launch, device)]


def _only_block(program: Program, device: torch.device) -> Block | None:
    """The kernel call that is all there is to do, if one is."""
    launch = program.only_launch
    return launch if launch and kernel_blocks(launch, device) == [launch] else None


class _Totals:
    """What parts over spans of tokens amount to. The first part of a span is copied rather than added, so that nothing
    has to be blank before: on a CPU, blanking and adding cost a hundredth of attention itself."""

    def __init__(self, tensors: tuple[Tensor, ...], blanks: tuple[float, ...], absorb: Absorb) -> None:
        """
        Args:
            tensors: (1, heads, tokens, ...) each, of any content.
            blanks: of each, what no part at all amounts to.
            absorb: takes parts into totals, in place.
        """
        self.tensors, self._blanks, self._absorb = tensors, blanks, absorb
        self._seen: list[Span] = []

    def add(self, span: Span, parts: tuple[Tensor, ...]) -> None:
        """Takes in the part of the tokens in `span`."""
        gaps = self._see(span)
        totals = tuple(x[:, :, slice(*span)] for x in self.tensors)
        if gaps == [span]:
            for total, part in zip(totals, parts, strict=True):
                total.copy_(part)
        else:
            self._blank(gaps)
            self._absorb(totals, parts)

    def close(self) -> None:
        """Blanks what had no part."""
        self._blank(self._see((0, self.tensors[0].shape[2])))

    def _blank(self, gaps: list[Span]) -> None:
        for span in gaps:
            for total, blank in zip(self.tensors, self._blanks, strict=True):
                total[:, :, slice(*span)] = blank

    def _see(self, span: Span) -> list[Span]:
        """What of `span` had no part yet; from now on it has. `_seen` is ascending, its spans apart."""
        begin = bisect_left(self._seen, span[0], key=lambda seen: seen[1])
        end = bisect_right(self._seen, span[1], key=lambda seen: seen[0])
        touched = self._seen[begin:end]
        edges = [span[0], *(edge for seen in touched for edge in seen), span[1]]
        gaps = [(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True) if start < stop]
        self._seen[begin:end] = [(min(edges), max(edges))]
        return gaps


Absorb = Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], None]


def answer_totals(q: Tensor) -> _Totals:
    """Output and log-sum-exp of queries, of which parts are to come."""
    exact = _exact(q.dtype)
    return _Totals(
        (q.new_empty(q.shape, dtype=exact), q.new_empty(q.shape[:3], dtype=exact)), (0.0, -torch.inf), _merge
    )


def _sums(dtype: torch.dtype, *like: Tensor) -> _Totals:
    """Gradients of tensors."""
    return _Totals(tuple(x.new_empty(x.shape, dtype=dtype) for x in like), (0.0,) * len(like), _add)


def _exact(dtype: torch.dtype) -> torch.dtype:
    """The type in which partial results are added up."""
    return torch.promote_types(dtype, torch.float32)


def _add(totals: tuple[Tensor, ...], parts: tuple[Tensor, ...]) -> None:
    for total, part in zip(totals, parts, strict=True):
        total += part


def _merge(totals: tuple[Tensor, ...], parts: tuple[Tensor, ...]) -> None:
    """Merges a partial softmax (out, lse), in place: each side is weighted by exp(its lse - the joint lse), of which
    the block's is sigmoid(its lse - the other's), and the other's is what that leaves of 1."""
    (out, lse), (block_out, block_lse) = totals, parts
    out.lerp_(block_out.to(out.dtype), (block_lse - lse).sigmoid().unsqueeze(-1))
    torch.logaddexp(lse, block_lse, out=lse)
