"""Exact attention over a fold: the executor of a plan.

Tensors of one rank outside attention are `(1, heads, tokens of this rank, head_dim)`. `FoldedPlan.attend` moves them in
three steps:

1. heads (`heads` group): one all-to-all carries q, k and v, so that each rank holds some heads of all tokens of its
   context rank (DeepSpeed-Ulysses, Jacobs et al. 2023; the head axis of LoongTrain's 2D-Attention);
2. context: transfers of just the needed keys and values are posted ahead, straight to whom they serve; tasks on own
   keys run first, then those of each source as it arrives; partial outputs are merged by their log-sum-exp
   (Ring Attention, Liu et al. 2023);
3. heads back: the reverse all-to-all.

Partial outputs, log-sum-exps and gradients are accumulated in fp32 (fp64 for fp64 inputs): in bf16 they would cost more
accuracy than the kernel itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from longvila.errors import ConfigError
from longvila.parallel.exchange import all_to_all
from longvila.parallel.fold import Fold
from longvila.parallel.kernel import block_backward, block_forward
from longvila.parallel.layout import Span
from longvila.parallel.plan import Plan


class FoldedPlan:
    """A plan bound to this rank's fold. Travels to every attention layer as the keyword argument `plan`.

    Not a dataclass: FSDP2 walks through dataclasses among the arguments of every layer, and a plan has thousands of
    entries.
    """

    def __init__(self, plan: Plan, fold: Fold) -> None:
        self.plan = plan
        self.fold = fold

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Causal attention within each document of the row.

        Args:
            q: (1, Hq, t, D), k and v: (1, Hkv, t, D), with t this rank's tokens; Hq a multiple of Hkv.
            scale: factor of the scores.

        Returns:
            (1, Hq, t, D). Differentiable in q, k and v.

        Raises:
            ConfigError: for shapes or types that do not fit together, or a head axis longer than Hq.
        """
        self._check(q, k, v)
        ranges = [_head_range(q.shape[1], h, self.fold.num_heads) for h in range(self.fold.num_heads)]
        if self.fold.num_heads == 1:
            return _ContextAttention.apply(q, k, v, self, scale)
        tokens = self.plan.rank_tokens(self.fold.part)
        q, k, v = self._scatter_heads(q, k, v, ranges, tokens)
        out = _ContextAttention.apply(q, k, v, self, scale)
        return self._gather_heads(out, ranges, tokens)

    def _check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        expected = self.plan.rank_tokens(self.fold.part)[self.fold.head]
        if not (q.shape[2] == k.shape[2] == v.shape[2] == expected) or q.shape[0] != 1:
            raise ConfigError(
                f"the plan gives this rank 1 x {expected} tokens, but q, k, v have {q.shape[0]} x {q.shape[2]}, "
                f"{k.shape[2]} and {v.shape[2]}"
            )
        if len({q.dtype, k.dtype, v.dtype}) > 1:
            raise ConfigError(f"q, k and v must have one type, not {q.dtype}, {k.dtype} and {v.dtype}")
        if q.shape[1] % k.shape[1] or k.shape[1] != v.shape[1]:
            raise ConfigError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key and {v.shape[1]} value heads")
        if q.shape[3] != v.shape[3]:
            raise ConfigError(f"head dims of queries ({q.shape[3]}) and values ({v.shape[3]}) must be equal")
        if self.fold.num_heads > q.shape[1]:
            raise ConfigError(
                f"a head axis of {self.fold.num_heads} ranks leaves ranks without one of the {q.shape[1]} query heads; "
                f"use parallel.head <= {q.shape[1]}"
            )

    def _scatter_heads(
        self, q: Tensor, k: Tensor, v: Tensor, ranges: list[Span], tokens: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All heads of my tokens -> my heads of all tokens of the context rank."""
        dim, group = q.shape[3], q.shape[1] // k.shape[1]
        kv_ranges = [(start // group, (stop - 1) // group + 1) for start, stop in ranges]
        pieces, in_splits = [], []
        for (q0, q1), (k0, k1) in zip(ranges, kv_ranges, strict=True):
            piece = torch.cat([q[0, q0:q1], k[0, k0:k1], v[0, k0:k1]]).flatten()
            pieces.append(piece)
            in_splits.append(piece.numel())
        (q0, q1), (k0, k1) = ranges[self.fold.head], kv_ranges[self.fold.head]
        num_q, num_kv = q1 - q0, k1 - k0
        out_splits = [(num_q + 2 * num_kv) * count * dim for count in tokens]
        received = all_to_all(torch.cat(pieces), in_splits, out_splits, self.fold.heads)
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

    def _gather_heads(self, out: Tensor, ranges: list[Span], tokens: Sequence[int]) -> Tensor:
        """My heads of all tokens of the context rank -> all heads of my tokens."""
        mine, dim = tokens[self.fold.head], out.shape[3]
        pieces = [piece.flatten() for piece in out[0].split(list(tokens), dim=1)]
        out_splits = [(stop - start) * mine * dim for start, stop in ranges]
        received = all_to_all(torch.cat(pieces), [p.numel() for p in pieces], out_splits, self.fold.heads)
        return received.view(1, ranges[-1][1], mine, dim)


class _ContextAttention(torch.autograd.Function):
    """Step 2: attention of the heads at hand over all context ranks."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, folded: FoldedPlan, scale: float) -> Tensor:  # type: ignore[override]
        plan, me = folded.plan, folded.fold.part
        arrivals = _KeyExchange(folded, k, v)
        exact = torch.promote_types(q.dtype, torch.float32)
        out = torch.zeros(q.shape, dtype=exact, device=q.device)
        lse = torch.full(q.shape[:3], -torch.inf, dtype=exact, device=q.device)
        for source in _visiting_order(me, plan.parts):
            if not plan.tasks[me][source]:
                continue
            keys, values = (k, v) if source == me else arrivals.wait(source)
            for task in plan.tasks[me][source]:
                rows, columns = slice(*task.q), slice(*task.k)
                block = block_forward(q[:, :, rows], keys[:, :, columns], values[:, :, columns], task.causal, scale)
                _merge(out[:, :, rows], lse[:, :, rows], *block)
        arrivals.finish()
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.folded, ctx.scale = folded, scale
        return out

    @staticmethod
    def backward(ctx, grad_out: Tensor):  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        folded: FoldedPlan = ctx.folded
        plan, me = folded.plan, folded.fold.part
        arrivals = _KeyExchange(folded, k, v)
        returns = _GradientReturn(folded, k)
        dq, dk, dv = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (q, k, v))
        for source in _visiting_order(me, plan.parts):
            if not plan.tasks[me][source]:
                continue
            if source == me:
                keys, values, dkeys, dvalues = k, v, dk, dv
            else:
                keys, values = arrivals.wait(source)
                dkeys, dvalues = returns.buffer(source)
            for task in plan.tasks[me][source]:
                rows, columns = slice(*task.q), slice(*task.k)
                grads = block_backward(
                    grad_out[:, :, rows], q[:, :, rows], keys[:, :, columns], values[:, :, columns],
                    out[:, :, rows], lse[:, :, rows], task.causal, ctx.scale,
                )  # fmt: skip
                for total, grad in zip(
                    (dq[:, :, rows], dkeys[:, :, columns], dvalues[:, :, columns]), grads, strict=True
                ):
                    total += grad
        arrivals.finish()
        returns.collect(dk, dv)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


class _KeyExchange:
    """Posts every transfer of keys and values that the plan names; `wait(source)` gives the block of one source."""

    def __init__(self, folded: FoldedPlan, k: Tensor, v: Tensor) -> None:
        plan, me = folded.plan, folded.fold.part
        self._blocks: dict[int, Tensor] = {}
        outgoing, incoming = {}, {}
        for peer in _visiting_order(me, plan.parts)[1:]:
            if spans := plan.sends[me][peer]:
                outgoing[peer] = torch.stack([_take(k, spans), _take(v, spans)])
            if spans := plan.sends[peer][me]:
                count = sum(stop - start for start, stop in spans)
                self._blocks[peer] = k.new_empty((2, *k.shape[:2], count, k.shape[3]))
                incoming[peer] = self._blocks[peer]
        self._outgoing = outgoing  # alive until `finish`: their sends may still be reading them
        self._works, self._sends = _post(folded.fold.context, outgoing, incoming)

    def wait(self, source: int) -> tuple[Tensor, Tensor]:
        self._works[source].wait()
        keys, values = self._blocks[source].unbind()
        return keys, values

    def finish(self) -> None:
        """Waits for the sends."""
        for work in self._sends:
            work.wait()
        self._outgoing.clear()


class _GradientReturn:
    """Carries gradients of keys and values home to the rank that owns them, in the accumulation type.

    All transfers are posted as one batch after the last task: with NCCL, a send posted before its peer's receive could
    wait for a peer that is itself waiting to send.
    """

    def __init__(self, folded: FoldedPlan, k: Tensor) -> None:
        self._sends, self._me, self._group = folded.plan.sends, folded.fold.part, folded.fold.context_gradients
        self._like = k
        self._buffers: dict[int, Tensor] = {}

    def _zeros(self, spans: tuple[Span, ...]) -> Tensor:
        count = sum(stop - start for start, stop in spans)
        exact = torch.promote_types(self._like.dtype, torch.float32)
        return self._like.new_zeros((2, *self._like.shape[:2], count, self._like.shape[3]), dtype=exact)

    def buffer(self, source: int) -> tuple[Tensor, Tensor]:
        """Zeros for the gradients of the keys and values that `source` sent."""
        self._buffers[source] = self._zeros(self._sends[source][self._me])
        dkeys, dvalues = self._buffers[source].unbind()
        return dkeys, dvalues

    def collect(self, dk: Tensor, dv: Tensor) -> None:
        """Sends every buffer home, and adds what the other ranks computed for this rank's keys and values."""
        blocks = {peer: self._zeros(spans) for peer, spans in enumerate(self._sends[self._me]) if spans}
        arrivals, sends = _post(self._group, self._buffers, blocks)
        for peer, block in blocks.items():
            arrivals[peer].wait()
            spans = self._sends[self._me][peer]
            pieces = block.split([stop - start for start, stop in spans], dim=3)
            for (start, stop), piece in zip(spans, pieces, strict=True):
                dk[:, :, start:stop] += piece[0]
                dv[:, :, start:stop] += piece[1]
        for work in sends:
            work.wait()


def _post(
    group: dist.ProcessGroup, outgoing: dict[int, Tensor], incoming: dict[int, Tensor]
) -> tuple[dict[int, dist.Work], list[dist.Work]]:
    """Posts sends and receives; returns the work of each receive by peer, and those of the sends."""
    ops = [dist.P2POp(dist.isend, t, group=group, group_peer=peer) for peer, t in outgoing.items()]
    ops += [dist.P2POp(dist.irecv, t, group=group, group_peer=peer) for peer, t in incoming.items()]
    if not ops:
        return {}, []
    works = dist.batch_isend_irecv(ops)
    if len(works) < len(ops):  # NCCL coalesces a batch into one work
        return dict.fromkeys(incoming, works[0]), list(works)
    return dict(zip(incoming, works[len(outgoing) :], strict=True)), works[: len(outgoing)]


def _visiting_order(me: int, parts: int) -> list[int]:
    """Own keys first, then those of the ranks before this one, nearest first: at each step every rank serves one."""
    return [(me - step) % parts for step in range(parts)]


def _take(x: Tensor, spans: tuple[Span, ...]) -> Tensor:
    return torch.cat([x[:, :, start:stop] for start, stop in spans], dim=2)


def _merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Merges a partial softmax into `out`, `lse` in place: each side is weighted by exp(its lse - the joint lse)."""
    joint = torch.logaddexp(lse, block_lse)
    out.mul_((lse - joint).exp().unsqueeze(-1)).add_(block_out * (block_lse - joint).exp().unsqueeze(-1))
    lse.copy_(joint)


def _head_range(heads: int, rank: int, ranks: int) -> Span:
    return heads * rank // ranks, heads * (rank + 1) // ranks
