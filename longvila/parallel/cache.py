"""Attention of a sequence that grows, over keys and values that lie on the ranks of a group: prompts longer than one
device holds.

Tokens come in chunks: a piece of a prompt, or the token that was generated last. Each chunk is cut evenly over the
ranks, in order (one token is the last rank's), and a rank keeps the keys and values of its tokens. So all ranks hold as
much of a prompt and compute as much for it, and one rule serves the prompt, what is asked next about the same film, and
every token of the answer. Layers with a window keep all tokens as others do, so that a prompt can be cut back.

What travels is queries, to all ranks, and back what each rank's keys amount to for them, an output with its log-sum-exp
(split keys, as Flash-Decoding merges them; Dao et al. 2023); keys and values stay where they are.
A ring would send keys and values instead, which are fewer numbers where query heads share them, but each chunk of a
prompt would send all that came before it once more.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from longvila.errors import ConfigError
from longvila.parallel.attention import answer_totals, check_heads
from longvila.parallel.batch import even_share
from longvila.parallel.blocks import Block, Mask, Span, visible_blocks
from longvila.parallel.exchange import all_to_all
from longvila.parallel.kernel import block_forward, kernel_blocks
from longvila.parallel.tensor import gather_tokens

GROWTH = 1.25
"""Room for keys and values is made for so many times as many tokens as there are, so that few are copied often."""


class ShardedCache:
    """Keys and values of one sequence. Travels to every attention layer as the keyword argument `plan`, as a plan does.

    Every rank of the group makes the same calls. Not differentiable.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._rank, self._ranks = dist.get_rank(group), dist.get_world_size(group)
        self.length = 0
        """Tokens of the sequence, those of all ranks."""
        self._before: list[Span] = []
        """Positions of this rank's tokens of earlier chunks, ascending."""
        self._chunk: Span = (0, 0)
        self._mine: Span = (0, 0)
        self._shares: list[int] = []
        """Tokens of the chunk on each rank."""
        self._blocks: dict[Mask, list[Block]] = {}
        self._asked: set[int] = set()
        self._held: dict[int, tuple[Tensor, Tensor]] = {}
        """Of each layer, keys and values (1, Hkv, room, D)."""

    @property
    def longest(self) -> int:
        """Tokens of the longest document: there is one."""
        return self.length

    @property
    def num_held(self) -> int:
        """Tokens whose keys and values this rank has."""
        return sum(stop - start for start, stop in (*self._before, self._mine))

    def begin(self, count: int) -> range:
        """Opens the next chunk, of `count` tokens; one forward pass of the model follows.

        Returns:
            Positions of those that this rank takes; the last rank always takes one.
        """
        self._end_chunk()
        start = self.length
        self.length += count
        shares = [even_share(count, rank, self._ranks) for rank in range(self._ranks)]
        self._chunk, self._shares = (start, self.length), [len(share) for share in shares]
        mine = range(start + shares[self._rank].start, start + shares[self._rank].stop)
        self._mine = mine.start, mine.stop
        return mine

    def crop(self, length: int) -> None:
        """Forgets all tokens but the first `length`."""
        self._end_chunk()
        self._before = [(start, min(stop, length)) for start, stop in self._before if start < length]
        self.length = min(length, self.length)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Mask = Mask(), layer: int = -1) -> Tensor:
        """Attention of the open chunk's tokens to all up to themselves. Collective.

        Args:
            q: (1, Hq, t, D), k and v: (1, Hkv, t, D), of this rank's tokens of the chunk; Hq is a multiple of Hkv. A
                rank that has none of them brings one that counts for nothing: models do not run on no tokens.
            scale: factor of the scores.
            mask: causal, with a window or without.
            layer: number of the layer that asks, once in a chunk.

        Returns:
            (1, Hq, t, D).

        Raises:
            ConfigError: for shapes or types that do not fit together, other numbers of tokens, a layer that asks twice
                or has no number, or a mask that lets tokens see later ones.
        """
        check_heads(q, k, v)
        nothing = None
        if not self._shares[self._rank]:
            nothing, q, k, v = torch.zeros_like(q), *(x[:, :, 1:] for x in (q, k, v))
        keys, values = self._extend(layer, k, v)
        queries = gather_tokens(q[0].transpose(0, 1).contiguous(), self._shares, self._group, "queries")
        queries = queries.transpose(0, 1)[None]
        answer = answer_totals(queries)
        for launch in self._blocks_of(mask):
            for block in kernel_blocks(launch, q.device):
                rows, columns = slice(*block.q), slice(*block.k)
                arguments = queries[:, :, rows], keys[:, :, columns], values[:, :, columns]
                answer.add(block.q, block_forward(*arguments, block.kind, scale, block.cuts))
        answer.close()
        found = self._collect(*answer.tensors).to(q.dtype)
        return found if nothing is None else nothing

    def _extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Puts the chunk's keys and values behind those of a layer, and returns all of this rank's."""
        count, total = k.shape[2], self.num_held
        if count != self._shares[self._rank] or layer < 0 or layer in self._asked:
            raise ConfigError(
                f"layer {layer} brings {count} tokens to a chunk of which this rank has {self._shares[self._rank]}, "
                f"and layers {sorted(self._asked)} have asked; each asks once, by its number, for all of them"
            )
        self._asked.add(layer)
        held = self._held.get(layer, (k[:, :, :0], v[:, :, :0]))
        if held[0].shape[2] < total:
            room = int(total * GROWTH)
            grown = tuple(x.new_empty(*x.shape[:2], room, x.shape[3]) for x in (k, v))
            for new, old in zip(grown, held, strict=True):
                new[:, :, : total - count] = old[:, :, : total - count]
            held = self._held[layer] = grown[0], grown[1]
        for place, new in zip(held, (k, v), strict=True):
            place[:, :, total - count : total] = new
        return held[0][:, :, :total], held[1][:, :, :total]

    def _collect(self, out: Tensor, lse: Tensor) -> Tensor:
        """This rank's tokens of what the keys of every rank amount to: out (1, Hq, n, D) and lse (1, Hq, n)."""
        parts = torch.cat([out[0].transpose(0, 1), lse[0].transpose(0, 1).unsqueeze(-1)], dim=-1)
        mine = self._shares[self._rank]
        received = all_to_all(parts, self._shares, [mine] * self._ranks, self._group, "answers")
        outs, lses = received.view(self._ranks, mine, *parts.shape[1:]).split([out.shape[-1], 1], dim=-1)
        return (lses.softmax(dim=0) * outs).sum(0).transpose(0, 1)[None]

    def _end_chunk(self) -> None:
        """What was new is like all before it."""
        if self._mine[0] < self._mine[1]:
            if self._before and self._before[-1][1] == self._mine[0]:
                self._mine = self._before.pop()[0], self._mine[1]
            self._before.append(self._mine)
        self._chunk = self._mine = self.length, self.length
        self._shares = [0] * self._ranks
        self._blocks, self._asked = {}, set()

    def _blocks_of(self, mask: Mask) -> list[Block]:
        """What the chunk's queries see of this rank's keys, numbered from the first query and the first key."""
        if mask not in self._blocks:
            if not mask.causal:
                raise ConfigError("tokens that see later ones cannot be generated one after the other")
            self._blocks[mask] = self._find_blocks(mask)
        return self._blocks[mask]

    def _find_blocks(self, mask: Mask) -> list[Block]:
        (start, stop), (first, last) = self._chunk, self._mine
        num_before = self.num_held - (last - first)
        found: list[Block] = []
        if mask.window is None and num_before:
            found.append(Block((0, stop - start), (0, num_before), "full"))
        runs = [*(self._before if mask.window is not None else []), self._mine]
        place = num_before - sum(b - a for a, b in runs[:-1])
        for run in runs:
            queries = [(start, stop)] if run[1] <= start else [run, (run[1], stop)]
            for span in queries:
                if span[0] < span[1] and run[0] < run[1]:
                    for block in visible_blocks(span, run, mask):
                        rows = block.q[0] - start, block.q[1] - start
                        columns = block.k[0] - run[0] + place, block.k[1] - run[0] + place
                        found.append(Block(rows, columns, block.kind))
            place += run[1] - run[0]
        return found
