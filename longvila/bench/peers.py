"""Folds against what else runs the same model: Hugging Face on one process, and DeepSpeed's Ulysses (ALST).

All contenders take the same small causal language model in fp32, the same weights and the same row on a CPU, one thread
a process, two processes where they share the row: no FSDP, no activation checkpointing, no tiling. Each is called as
its own documentation says, with position ids that restart in each document.

- Exactness: loss and gradients against documents that are run one at a time, in fp64, on one process.
- Time: CPU time of the processes, summed, of a forward and backward pass; the sum of gradients over ranks, which is the
  same for all, is left out. Minimum over repeats.
- Memory: the most that torch's allocator held at one time beyond weights and row, buffers inside of kernels and
  exchanges included, as its profiler records every allocation and release. On ranks, the largest.
"""

from __future__ import annotations

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

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen3Config, Qwen3ForCausalLM

from longvila.apply import apply_folds
from longvila.config import ParallelConfig
from longvila.parallel.agree import barrier
from longvila.parallel.batch import shard_batch, shift_labels
from longvila.parallel.fold import make_fold
from longvila.parallel.launch import RankError, run_ranks

RANKS = 2
EXACT = 1e-3
"""A peer whose gradients are further off does other work than the row asks for, and its time is not compared."""
HUGGING_FACE = "Hugging Face sdpa, one process"
ULYSSES = "DeepSpeed Ulysses sdpa, 2 ranks"
FOLDS = {"longvila head=2": ParallelConfig(head=2), "longvila inner=2": ParallelConfig(inner=2)}
ABSENT = "deepspeed is not installed; pip install 'longvila[peers]'"
_NO_FIGURES = dict.fromkeys(("gradient_error", "loss_error", "cpu_us_per_token", "peak_mib"))
_IGNORE = -100
_SHARES = (37, 5, 22, 12, 1, 17, 6)
"""Relative lengths of the documents of a packed row."""


@dataclass(frozen=True)
class _Row:
    """A row, and what its forward and backward should give."""

    lengths: tuple[int, ...]
    ids: Tensor
    """(N,)"""
    loss: float = 0.0
    """Mean over targets, of which each document has one less than tokens."""
    gradients: dict[str, Tensor] | None = None

    @property
    def positions(self) -> Tensor:
        """(N,) restarting in each document."""
        return torch.cat([torch.arange(length) for length in self.lengths])

    @property
    def labels(self) -> Tensor:
        """(N,) the next token of the document."""
        return shift_labels(self.ids, self.lengths, _IGNORE)

    @property
    def num_targets(self) -> int:
        return len(self.ids) - len(self.lengths)


@dataclass(frozen=True)
class _Figures:
    """One row on one rank."""

    loss: float
    """This rank's part of it."""
    gradient_error: float
    cpu_seconds: tuple[float, ...]
    """Of each repeat."""
    peak_bytes: int


_Batch = tuple[dict[str, Any], Tensor]
"""Keywords of the model's forward, and labels (t,)."""


def compare(quick: bool = False) -> list[dict[str, Any]]:
    """Every contender on a row of one document and on a packed row, of 8192 tokens (`quick`: 2048, fewer repeats).

    Returns:
        A dict for each contender and row: `contender`, `row` (`one document` or `packed`), `ran`, `why_not`,
        `gradient_error` (of the worst parameter) and `loss_error` as max |difference| / max |reference|,
        `cpu_us_per_token`, `peak_mib` (MiB of the rank that held most). Figures are None where it did not run.

    Raises:
        RankError: where anything but the DeepSpeed peer fails.
    """
    tokens, rounds, repeats = (2048, 1, 4) if quick else (8192, 2, 2)
    packed = tuple(tokens * share // sum(_SHARES) for share in _SHARES[1:])
    lengths = {"one document": (tokens,), "packed": (tokens - sum(packed), *packed)}
    rows = run_ranks(_references, 1, list(lengths.values()), timeout=600)[0]
    found: dict[str, list[list[list[_Figures]]]] = {name: [] for name in (*FOLDS, HUGGING_FACE, ULYSSES)}
    reasons: dict[str, str] = {} if importlib.util.find_spec("deepspeed") else {ULYSSES: ABSENT}
    for _ in range(rounds):  # in turns, so that a machine that grows busier does not favour the first
        for name in (name for name in found if name not in reasons):
            try:
                ranks = 1 if name == HUGGING_FACE else RANKS
                found[name].append(run_ranks(_measure, ranks, name, rows, repeats, timeout=900))
            except RankError as error:
                if name != ULYSSES:
                    raise
                reasons[name] = _last_lines(error)
    table = []
    for name, by_round in found.items():
        for index, kind in enumerate(lengths):
            entry = {"contender": name, "row": kind, "ran": name not in reasons, "why_not": reasons.get(name)}
            figures = [[rank[index] for rank in by_rank] for by_rank in by_round]
            table.append({**entry, **(_summary(rows[index], figures) if entry["ran"] else _NO_FIGURES)})
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
        peers = [
            row["cpu_us_per_token"] for row in ran if row["contender"] not in FOLDS and row["gradient_error"] <= EXACT
        ]
        if not folds or not peers:
            return None
        ratios.append(min(folds) / min(peers))
    return max(ratios, default=None)


def _summary(row: _Row, rounds: list[list[_Figures]]) -> dict[str, float]:
    """From the figures of every rank in every round."""
    seconds = [sum(repeat) for ranks in rounds for repeat in zip(*(one.cpu_seconds for one in ranks), strict=True)]
    losses = [sum(one.loss for one in ranks) for ranks in rounds]
    return {
        "gradient_error": max(one.gradient_error for ranks in rounds for one in ranks),
        "loss_error": max(abs(loss - row.loss) for loss in losses) / abs(row.loss),
        "cpu_us_per_token": min(seconds) / len(row.ids) * 1e6,
        "peak_mib": max(one.peak_bytes for ranks in rounds for one in ranks) / 2**20,
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
        num_key_value_heads=2, head_dim=64, max_position_embeddings=8192, attn_implementation="sdpa",
    )  # fmt: skip
    return Qwen3ForCausalLM(config).train()


def _references(rows: list[tuple[int, ...]]) -> list[_Row]:
    """Each document by itself, so that neither masks nor shards take part."""
    found = []
    for lengths in rows:
        ids = torch.randint(0, 256, (sum(lengths),), generator=torch.Generator().manual_seed(1))
        row, model, loss = _Row(lengths, ids), _model().double(), 0.0
        for document in ids.split(lengths):
            logits = model(document[None, :-1], use_cache=False).logits[0]
            part = F.cross_entropy(logits, document[1:], reduction="sum") / row.num_targets
            part.backward()
            loss += part.item()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append(_Row(lengths, ids, loss, gradients))
    return found


def _measure(name: str, rows: list[_Row], repeats: int) -> list[_Figures]:
    """On each rank of a contender. The first pass of a row, which warms up, gives all but the time."""
    os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler writes to stderr that there is no GPU
    model = _model()
    cut = _fold_cut(model, FOLDS[name]) if name in FOLDS else _ulysses_cut(model) if name == ULYSSES else _whole
    found = []
    for row in rows:
        model.zero_grad()
        inputs, labels = cut(row)
        loss, peak = _peak(lambda: _step(model, inputs, labels, row.num_targets))  # noqa: B023
        error, seconds = _gradient_error(model, row), []
        for _ in range(repeats):
            model.zero_grad()
            barrier()
            begin = time.process_time()
            _step(model, inputs, labels, row.num_targets)
            seconds.append(time.process_time() - begin)
        found.append(_Figures(loss, error, tuple(seconds), peak))
    return found


def _step(model: Qwen3ForCausalLM, inputs: dict[str, Any], labels: Tensor, num_targets: int) -> float:
    logits = model(**inputs, use_cache=False).logits[0]
    loss = F.cross_entropy(logits, labels, ignore_index=_IGNORE, reduction="sum") / num_targets
    loss.backward()
    return loss.item()


def _whole(row: _Row) -> _Batch:
    """transformers finds documents by their positions, and makes the mask."""
    return {"input_ids": row.ids[None], "position_ids": row.positions[None]}, row.labels


def _fold_cut(model: Qwen3ForCausalLM, parallel: ParallelConfig) -> Callable[[_Row], _Batch]:
    fold = make_fold(parallel, "cpu")
    apply_folds(model, fold, shard=False)

    def cut(row: _Row) -> _Batch:
        tensors = {"input_ids": row.ids, "position_ids": row.positions, "labels": row.labels}
        inputs = shard_batch(row.lengths, fold, parallel.layout, **tensors)
        return inputs, inputs.pop("labels")[0]

    return cut


def _ulysses_cut(model: Qwen3ForCausalLM) -> Callable[[_Row], _Batch]:
    """Replaces `sdpa` for this whole process, as DeepSpeed does, and cuts as its data loader does: equal chunks."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # read when it is imported
    comm = importlib.import_module("deepspeed.comm")
    ulysses = importlib.import_module("deepspeed.runtime.sequence_parallel.ulysses_sp")
    # Otherwise it compiles a kernel for all-reduce, in a minute or two; attention exchanges by gloo with or without it.
    importlib.import_module("deepspeed.ops").__dict__["__compatible_ops__"] = {}
    comm.init_distributed(dist_backend="gloo")  # takes the process group that is there
    ulysses.UlyssesSPAttentionHF.register_with_transformers(model, "sdpa", RANKS, micro_batch_size=1)

    def cut(row: _Row) -> _Batch:
        ids, positions, labels = (
            x.chunk(RANKS)[dist.get_rank()].contiguous() for x in (row.ids, row.positions, row.labels)
        )
        return {"input_ids": ids[None], "position_ids": positions[None]}, labels

    return cut


def _gradient_error(model: Qwen3ForCausalLM, row: _Row) -> float:
    """Of the worst parameter, gradients being summed over ranks."""
    errors = []
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and row.gradients is not None
        dist.all_reduce(parameter.grad)
        expected = row.gradients[name]
        errors.append(((parameter.grad - expected).abs().max() / expected.abs().max()).item())
    return max(errors)


def _peak(run: Callable[[], float]) -> tuple[float, int]:
    """What `run` returns, and the most bytes that this process's tensors grew by while it ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        answer = run()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "trace.json")
        profiler.export_chrome_trace(path)
        with open(path) as file:
            events = json.load(file)["traceEvents"]
    changes = sorted((one for one in events if one["name"] == "[memory]"), key=lambda one: one["ts"])
    return answer, max(itertools.accumulate(one["args"]["Bytes"] for one in changes), default=0)
