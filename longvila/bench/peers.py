"""Folds against what else runs the same model: Hugging Face on one process, and DeepSpeed's Ulysses (ALST).

All take the same small causal language model in fp32, the same weights and the same row on a CPU, one thread a process,
two processes where they share the row: no FSDP, no activation checkpointing, no tiling. All attend with torch's flash
kernel for CPUs, and are given position ids that restart in each document.

- Exactness: loss and gradients against fp64 on one process, documents one at a time.
- Time: CPU time of a forward and backward pass, of each process the least of several, summed. Cutting the row is left
  out, and summing gradients over ranks. A process that has the machine to itself runs faster than two that share its
  caches and memory, so Hugging Face runs both ways, alone and as two processes with a copy of the row each.
- Memory: the most that torch's allocator held at one time beyond weights and row, as its profiler records it: tensors,
  and buffers inside of kernels and exchanges. Of ranks, the largest.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen3Config, Qwen3ForCausalLM

from longvila.apply import apply_folds
from longvila.bench.cell import least_seconds
from longvila.config import ParallelConfig
from longvila.difference import relative_error
from longvila.parallel.agree import barrier
from longvila.parallel.batch import shard_batch, shift_labels
from longvila.parallel.fold import make_fold
from longvila.parallel.launch import RankError, run_ranks
from longvila.train.deepspeed import import_deepspeed

RANKS = 2
PACKED_ROUNDS = 2
"""Of the packed row; all rounds go to one document, on which contenders come near each other."""
EXACT = 1e-3
"""A peer whose gradients are further off does other work than the row asks for, and its time is not compared."""
FOLDS = {"longvila head=2": ParallelConfig(head=2), "longvila inner=2": ParallelConfig(inner=2)}
HUGGING_FACE = "Hugging Face sdpa, one process"
TWINS = "Hugging Face sdpa, 2 processes, a row each"
ULYSSES = "DeepSpeed Ulysses sdpa, 2 ranks"
ABSENT = "deepspeed is not installed; pip install 'longvila[deepspeed]'"
_FIGURES = ("gradient_error", "loss_error", "cpu_us_per_token", "peak_mib")
_SHARES = (37, 5, 22, 12, 1, 17, 6)
"""Relative lengths of the documents of a packed row."""


@dataclass(frozen=True)
class _Row:
    """(N,) tensors, and the loss and gradients that they should give."""

    lengths: tuple[int, ...]
    ids: Tensor
    positions: Tensor
    labels: Tensor
    loss: float
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class _Figures:
    """Of one row on one rank; `loss` is this rank's part of it, `seconds` the CPU time of each repeat."""

    loss: float
    gradient_error: float
    seconds: list[float]
    peak_bytes: int


_Cut = Callable[[_Row], tuple[dict[str, Any], Tensor]]
"""From a row to this rank's keywords of the model's forward, and its labels (t,)."""


def compare(quick: bool = False) -> list[dict[str, Any]]:
    """Every contender on a row of one document and on a packed row, of 8192 tokens (`quick`: 2048, fewer repeats).

    Returns:
        A dict for each contender and row: `contender`, `row` (`one document` or `packed`), `ran`, `why_not`,
        `gradient_error` (of the worst parameter) and `loss_error` as max |difference| / max |reference|,
        `cpu_us_per_token`, `peak_mib` (MiB of the rank that held most). Figures are None where it did not run.

    Raises:
        RankError: where anything but the DeepSpeed peer fails.
    """
    tokens, rounds, repeats = (2048, 1, 4) if quick else (8192, 8, 3)
    packed = tuple(tokens * share // sum(_SHARES) for share in _SHARES[1:])
    lengths = {"one document": (tokens,), "packed": (tokens - sum(packed), *packed)}
    rows: list[_Row] = run_ranks(_references, 1, list(lengths.values()), timeout=600)[0]
    found: dict[str, list[list[list[_Figures]]]] = {name: [] for name in (*FOLDS, HUGGING_FACE, TWINS, ULYSSES)}
    reasons = {} if importlib.util.find_spec("deepspeed") else {ULYSSES: ABSENT}
    for turn in range(rounds):  # in turns, so that a machine that grows busier does not favour the first
        for name in (name for name in found if name not in reasons):
            try:
                ranks = 1 if name == HUGGING_FACE else RANKS
                now = rows if turn < PACKED_ROUNDS else rows[:1]
                found[name].append(run_ranks(_measure, ranks, name, now, repeats, timeout=600))
            except RankError as error:
                if name != ULYSSES:
                    raise
                reasons[name] = _last_lines(error)
    table = []
    for name, by_round in found.items():
        for index, kind in enumerate(lengths):
            figures = [[rank[index] for rank in by_rank] for by_rank in by_round if index < len(by_rank[0])]
            entry = {"contender": name, "row": kind, "ran": name not in reasons, "why_not": reasons.get(name)}
            copies = RANKS if name == TWINS else 1
            entry |= _summary(rows[index], figures, copies) if entry["ran"] else dict.fromkeys(_FIGURES)
            table.append(entry)
    return table


def time_ratio(rows: Sequence[dict[str, Any]]) -> float | None:
    """CPU time of the best fold over that of the best exact peer: the largest over the kinds of rows.

    Args:
        rows: what `compare` returned.

    Returns:
        None where a kind of row has no peer that is exact on it.
    """
    ratios = []
    for kind in {row["row"] for row in rows}:
        ran = [row for row in rows if row["row"] == kind and row["ran"]]
        folds = [row["cpu_us_per_token"] for row in ran if row["contender"] in FOLDS]
        peers = [row for row in ran if row["contender"] not in FOLDS and row["gradient_error"] <= EXACT]
        if not folds or not peers:
            return None
        ratios.append(min(folds) / min(row["cpu_us_per_token"] for row in peers))
    return max(ratios, default=None)


def _summary(row: _Row, rounds: list[list[_Figures]], copies: int) -> dict[str, float]:
    """From the figures of every rank in every round, of `copies` of the row."""
    seconds = least_seconds([[one.seconds for one in ranks] for ranks in rounds])
    return {
        "gradient_error": max(one.gradient_error for ranks in rounds for one in ranks),
        "loss_error": max(relative_error(sum(one.loss for one in ranks), row.loss) for ranks in rounds),
        "cpu_us_per_token": seconds / copies / len(row.ids) * 1e6,
        "peak_mib": min(max(one.peak_bytes for one in ranks) for ranks in rounds) / 2**20,
    }


def _last_lines(error: RankError) -> str:
    """What each rank raised."""
    tracebacks = [text.strip() for text in re.split(r"^rank \d+:$", str(error), flags=re.MULTILINE) if text.strip()]
    return "; ".join(dict.fromkeys(text.splitlines()[-1] for text in tracebacks))


def _model() -> Qwen3ForCausalLM:
    """Two layers in which attention outweighs the rest; the same weights each time."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=256, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=8192,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).train()
    model.set_attn_implementation("sdpa")
    return model


def _references(rows: list[tuple[int, ...]]) -> list[_Row]:
    """Each document by itself, so that neither masks nor shards take part."""
    found = []
    for lengths in rows:
        ids = torch.randint(0, 256, (sum(lengths),), generator=torch.Generator().manual_seed(1))
        model, loss = _model().double(), 0.0
        for document in ids.split(lengths):
            logits = model(document[None, :-1], use_cache=False).logits[0]
            part = F.cross_entropy(logits, document[1:], reduction="sum") / (len(ids) - len(lengths))
            part.backward()
            loss += part.item()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        positions = torch.cat([torch.arange(length) for length in lengths])
        found.append(_Row(lengths, ids, positions, shift_labels(ids, lengths), loss, gradients))
    return found


def _measure(name: str, rows: list[_Row], repeats: int) -> list[_Figures]:
    """On each rank of a contender. The first pass of a row, which warms up, gives all but the time."""
    model = _model()
    cut = _fold_cut(model, FOLDS[name]) if name in FOLDS else _ulysses_cut(model) if name == ULYSSES else _whole
    copies = RANKS if name == TWINS else 1
    return [_measure_row(model, row, *cut(row), repeats, copies) for row in rows]


def _measure_row(
    model: Qwen3ForCausalLM, row: _Row, inputs: dict[str, Any], labels: Tensor, repeats: int, copies: int
) -> _Figures:
    def step() -> float:
        logits = model(**inputs, use_cache=False).logits[0]
        loss = F.cross_entropy(logits, labels, reduction="sum") / (len(row.ids) - len(row.lengths)) / copies
        loss.backward()
        return loss.item()

    model.zero_grad()
    loss, peak = _peak(step)
    error, seconds = _gradient_error(model, row.gradients), []
    for _ in range(repeats):
        model.zero_grad()
        barrier()
        begin = time.process_time()
        step()
        seconds.append(time.process_time() - begin)
    return _Figures(loss, error, seconds, peak)


def _whole(row: _Row) -> tuple[dict[str, Any], Tensor]:
    """transformers finds documents by their positions, and makes a dense mask where there are several."""
    return {"input_ids": row.ids[None], "position_ids": row.positions[None]}, row.labels


def _fold_cut(model: Qwen3ForCausalLM, parallel: ParallelConfig) -> _Cut:
    fold = make_fold(parallel, "cpu")
    apply_folds(model, fold, sharding=None)

    def cut(row: _Row) -> tuple[dict[str, Any], Tensor]:
        batch = shard_batch(
            row.lengths, fold, parallel.layout, input_ids=row.ids, position_ids=row.positions, labels=row.labels
        )
        return batch, batch.pop("labels")[0]

    return cut


def _ulysses_cut(model: Qwen3ForCausalLM) -> _Cut:
    """Replaces `sdpa` in this whole process, as DeepSpeed does, and cuts as its data loader does: equal chunks."""
    import_deepspeed()
    ulysses = importlib.import_module("deepspeed.runtime.sequence_parallel.ulysses_sp")
    ulysses.UlyssesSPAttentionHF.register_with_transformers(model, "sdpa", RANKS, micro_batch_size=1)

    def cut(row: _Row) -> tuple[dict[str, Any], Tensor]:
        ids, positions, labels = (x.chunk(RANKS)[dist.get_rank()] for x in (row.ids, row.positions, row.labels))
        return {"input_ids": ids[None], "position_ids": positions[None]}, labels

    return cut


def _gradient_error(model: Qwen3ForCausalLM, expected: dict[str, Tensor]) -> float:
    """Of the worst parameter, gradients being summed over ranks."""
    errors = []
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
        errors.append(relative_error(parameter.grad, expected[name]))
    return max(errors)


def _peak(run: Callable[[], float]) -> tuple[float, int]:
    """What `run` returns, and the bytes by which this process's tensors grew at most while it ran."""
    os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler tells stderr that there is no GPU
    exchange = dist.all_to_all_single

    def patient(*args: Any, **kwargs: Any) -> Any:
        # A thread of gloo holds what it sent a moment longer, and what that thread releases would not be recorded.
        work = exchange(*args, **kwargs)
        time.sleep(0.05)
        return work

    with (
        mock.patch.object(dist, "all_to_all_single", patient),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        answer = run()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "trace.json")
        profiler.export_chrome_trace(path)
        with open(path) as file:
            events = json.load(file)["traceEvents"]
    changes = sorted((one for one in events if one["name"] == "[memory]"), key=lambda one: one["ts"])
    return answer, max(itertools.accumulate(one["args"]["Bytes"] for one in changes), default=0)
