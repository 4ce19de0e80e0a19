"""Carries out a program's transfers: keys and queries ahead of the steps that need them, results home.

Each transfer is a message for each tensor, cut along dim 2 to the transfer's tokens. Messages are posted in the
program's order, which both ends share; what a step waits for is its own inputs alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from longvila.parallel.blocks import Span
from longvila.parallel.fold import Links
from longvila.parallel.plan import Cargo, Program, Transfer
from longvila.parallel.traffic import count

Held = dict[tuple[Cargo, int], tuple[Tensor, ...]]


class Fetches:
    """Brings the keys and queries that the program names into `held`, and sends this rank's, in the planned order."""

    def __init__(self, program: Program, links: Links, held: Held) -> None:
        self._program, self._links, self._held = program, links, held
        self._mail = _Mail()

    def move(self, index: int) -> None:
        """Waits for what step `index` needs, then posts what is to be posted at it."""
        self._mail.wait(step=index)
        me = self._program.rank
        for batch in _batches(t for t in self._program.fetches if t.posted == index):
            outgoing, incoming = [], []
            for transfer in batch:
                if transfer.source == me:
                    outgoing.append((transfer, self._cargo(transfer)))
                else:
                    like = self._held[transfer.cargo, me]
                    blocks = tuple(x.new_empty(_resized(x, transfer.num_tokens)) for x in like)
                    self._held[transfer.cargo, transfer.owner] = blocks
                    incoming.append((transfer, blocks))
            self._mail.post(self._links, outgoing, incoming, index)

    def release(self, index: int) -> None:
        """After the tasks of step `index`: lets go of what no later step needs, so that a ring holds a few blocks at a
        time and not the whole row."""
        for key, last in self._program.last_uses.items():
            if last == index:
                self._held.pop(key)
        self._mail.release(index)

    def _cargo(self, transfer: Transfer) -> tuple[Tensor, ...]:
        tensors = self._held[transfer.cargo, transfer.owner]
        if transfer.owner != self._program.rank:  # passed on as it came
            return tensors
        return tuple(_take(x, transfer.spans) for x in tensors)

    def finish(self) -> None:
        self._mail.finish()


class Returns:
    """Carries results to the rank that owns the tokens they are for, adding up what meets on the way.

    Args:
        cargo: whose results: gradients of `keys`, or outputs or gradients of `queries`.
        mine: this rank's own totals, over all its tokens.
        absorb: adds parts to totals, in place.
    """

    def __init__(
        self,
        program: Program,
        cargo: Cargo,
        links: Links,
        mine: tuple[Tensor, ...],
        absorb: Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], None],
    ) -> None:
        self._program, self._links, self._mine, self._absorb = program, links, mine, absorb
        self._returns = [transfer for transfer in program.returns if transfer.cargo == cargo]
        self._open: dict[int, tuple[Tensor, ...]] = {}
        self._arrived: list[tuple[Transfer, tuple[Tensor, ...]]] = []
        self._mail = _Mail()

    def open(self, owner: int, totals: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Starts totals for the tokens of `owner` that were sent here."""
        self._open[owner] = totals
        return totals

    def move(self, index: int) -> None:
        """Posts what is to be posted at step `index`, after its tasks."""
        me = self._program.rank
        for batch in _batches(t for t in self._returns if t.posted == index):
            outgoing = [(t, self._close(t)) for t in batch if t.source == me]
            incoming = []
            for transfer in batch:
                if transfer.source != me:
                    blocks = tuple(x.new_empty(_resized(x, transfer.num_tokens)) for x in self._mine)
                    incoming.append((transfer, blocks))
            self._mail.post(self._links, outgoing, incoming, index)
            self._arrived += incoming
        self._mail.release(index)

    def _close(self, transfer: Transfer) -> tuple[Tensor, ...]:
        """What this rank and those before it have for `transfer.owner`."""
        totals = self._open.pop(transfer.owner, None)
        for before in [entry for entry in self._arrived if entry[0].owner == transfer.owner]:
            self._arrived.remove(before)
            self._mail.wait_for(before[0])
            if totals is None:
                totals = before[1]
            else:
                self._absorb(totals, before[1])
        if totals is None:  # a relay begins or passes here, and this rank has nothing to add
            totals = tuple(x.new_zeros(_resized(x, transfer.num_tokens)) for x in self._mine)
        return totals

    def finish(self) -> None:
        """Adds what came for this rank's own tokens, in the order of steps, so that sums do not depend on timing."""
        for transfer, blocks in self._arrived:
            self._mail.wait_for(transfer)
            offset = 0
            for start, stop in transfer.spans:
                piece = slice(offset, offset + stop - start)
                self._absorb(tuple(x[:, :, start:stop] for x in self._mine), tuple(x[:, :, piece] for x in blocks))
                offset += stop - start
        self._mail.finish()


class _Mail:
    """Posted messages that have not been waited for."""

    def __init__(self) -> None:
        self._receives: dict[Transfer, list[dist.Work]] = {}
        self._sends: list[tuple[int, bool, dist.Work, object]] = []
        """Of each: the step at which it was posted, whether it passes on what is another rank's and goes further, its
        work, and the tensor, which is read until it is done."""

    def post(
        self,
        links: Links,
        outgoing: list[tuple[Transfer, tuple[Tensor, ...]]],
        incoming: list[tuple[Transfer, tuple[Tensor, ...]]],
        index: int,
    ) -> None:
        """Posts one batch over one link class. NCCL makes it one operation, and its order is that of the program."""
        ops = []
        for send, pairs in ((True, outgoing), (False, incoming)):
            for transfer, tensors in pairs:
                group = links.inner if transfer.link == "inner" else links.outer
                peer = _rank_in(group, links, transfer.target if send else transfer.source)
                for x in tensors:
                    ops.append(dist.P2POp(dist.isend if send else dist.irecv, x, group=group, group_peer=peer))
                    if send:
                        count(f"bytes {transfer.cargo} {transfer.link}", x.numel() * x.element_size())
        if not ops:
            return
        works = dist.batch_isend_irecv(ops)
        if len(works) < len(ops):  # NCCL: one work for all
            works = [works[0]] * len(ops)
        remaining = iter(works)
        for transfer, tensors in outgoing:
            passed_on = transfer.owner not in (transfer.source, transfer.target)
            self._sends += [(index, passed_on, next(remaining), x) for x in tensors]
        for transfer, tensors in incoming:
            self._receives[transfer] = [next(remaining) for _ in tensors]

    def wait(self, step: int) -> None:
        """Waits for the messages that are needed at `step`."""
        for transfer in [transfer for transfer in self._receives if transfer.step == step]:
            self.wait_for(transfer)

    def wait_for(self, transfer: Transfer) -> None:
        for work in self._receives.pop(transfer):
            work.wait()

    def release(self, index: int) -> None:
        """Lets go of what was passed on before step `index`: the next rank, a step behind at most, has it. Other sends
        are not waited for, so that no rank waits for a slower one that it needs nothing from."""
        left = []
        for send in self._sends:
            posted, passed_on, work, _ = send
            if passed_on and posted < index:
                work.wait()
            else:
                left.append(send)
        self._sends = left

    def finish(self) -> None:
        """Waits for all sends."""
        for *_, work, _ in self._sends:
            work.wait()
        self._sends.clear()


def _batches(transfers: Iterable[Transfer]) -> list[list[Transfer]]:
    """Transfers that go as one operation: those of one step over one link class."""
    return [list(batch) for _, batch in itertools.groupby(transfers, key=lambda t: (t.posted, t.step, t.link))]


def _rank_in(group: dist.ProcessGroup, links: Links, part: int) -> int:
    """The rank in `group` of a context rank. Inner rings are cut from the context group one after the other."""
    return part if group is links.outer else part % dist.get_world_size(group)


def _resized(x: Tensor, num_tokens: int) -> tuple[int, ...]:
    return (*x.shape[:2], num_tokens, *x.shape[3:])


def _take(x: Tensor, spans: tuple[Span, ...]) -> Tensor:
    if len(spans) == 1:
        return x[:, :, slice(*spans[0])].contiguous()
    return torch.cat([x[:, :, start:stop] for start, stop in spans], dim=2)
