"""`longvila bench gpu`: what one GPU makes of attention and of whole training steps. Sections, tables and bars.

Attention has 32 query and 8 key/value heads of 128, in bf16. FLOPs are those of the model: 4 x head dim for each
visible pair and query head forward, twice that backward; what kernels compute again is not counted. MFU is by the dense
bf16 peak of the data sheet.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen2Config, Qwen2ForCausalLM

from longvila.bench.bars import at_most, sections
from longvila.bench.ours import RATE, TOWER, wrap
from longvila.config import ModelConfig, OptimizerConfig, ParallelConfig, StageConfig
from longvila.difference import relative_error
from longvila.errors import ConfigError
from longvila.parallel.attention import FoldedPlan
from longvila.parallel.batch import shift_labels
from longvila.parallel.blocks import Mask
from longvila.parallel.choose import make_plan
from longvila.parallel.fold import make_fold, start_world
from longvila.parallel.kernel import block_backward, block_forward, flash_attention_4
from longvila.shards.rows import Row
from longvila.train.engine import make_engine
from longvila.train.feed import Step
from longvila.train.flops import count_flops, peak_flops, visible_pairs
from longvila.train.optimizer import choose_trained
from longvila.train.step import TrainingState, take_step
from longvila.train.summary import count_parameters

Rows = list[dict[str, Any]]

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
SCALE = HEAD_DIM**-0.5
EXACT_ROWS: tuple[tuple[tuple[int, ...], Mask], ...] = (
    ((4096,), Mask()),
    ((1000, 2999, 1, 96), Mask()),
    ((2049,), Mask(causal=False)),
    ((1000, 3000), Mask(window=700)),
)
LENGTHS = (32_768, 131_072)
DOCUMENTS = 64
"""In the packed row of `LENGTHS[0]` tokens."""
STEP_LENGTHS = (8192, 32_768, 131_072)
TILE = 8192
REPEATS, STEPS, TOP = 10, 2, 5

RATIO = 2.0
OVERHEAD = 0.03


@dataclass(frozen=True)
class Shape:
    """A language model's, after a published one's configuration."""

    name: str
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool

    def config(self) -> Qwen2Config:
        return Qwen2Config(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.mlp,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            max_position_embeddings=2**20, tie_word_embeddings=self.tied,
        )  # fmt: skip


SHAPES = (
    Shape("Qwen2.5-1.5B", 1536, 8960, 28, 12, 2, 151_936, True),
    Shape("Qwen2.5-7B, 8 of its 28 layers", 3584, 18_944, 8, 28, 4, 152_064, False),
)


def run(show: Callable[[str, Rows, str], None]) -> dict[str, Any]:
    """Runs all sections on one GPU and returns what is written as JSON.

    Args:
        show: called with (title, rows, note) as each section is done.

    Raises:
        ConfigError: without a GPU.
    """
    if not torch.cuda.is_available():
        raise ConfigError("longvila bench gpu measures a GPU, and torch sees none here; `longvila doctor` says more")
    device = start_world()
    peak = peak_flops(device, "bf16")
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "peak": peak,
        "kernels": "FlashAttention 4" if flash_attention_4() else "FlashAttention 2",
    }

    section = sections(figures, show)

    note = "largest error in bf16 against fp64, by that of dense attention in bf16"
    exact = section("exact", [_exact(device, *row) for row in EXACT_ROWS], note)
    note = f"{figures['device']}, {figures['kernels']}, forward and backward, median of {REPEATS}"
    layers = section("layer", [row for n in LENGTHS for row in _layer(device, (n,), peak)], note)
    packed = (LENGTHS[0] // DOCUMENTS,) * DOCUMENTS
    section("packed", list(_layer(device, packed, peak)), f"{DOCUMENTS} documents in a row; {note}")
    note = (
        f"{figures['device']}; language model alone, every token a target, one document; AdamW, fp32 weights, bf16 "
        f"arithmetic, attention kept and the rest computed again, tiles of {TILE}; median of {STEPS} steps"
    )
    section("model", [row for shape in SHAPES for row in _train(device, shape, peak)], note)
    times = {row["contender"]: row["ms"] for row in layers if row["tokens"] == LENGTHS[0]}
    figures["bars"] = [
        at_most("gpu_error_ratio", max(row["ratio"] for row in exact), RATIO),
        at_most("gpu_plan_overhead", times["longvila"] / times["one kernel call"] - 1, OVERHEAD),
    ]
    return figures


def _inputs(device: torch.device, tokens: int) -> list[Tensor]:
    """q, k, v and the gradient of the output."""
    generator = torch.Generator(device).manual_seed(0)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    return [
        torch.randn(1, h, tokens, HEAD_DIM, device=device, dtype=torch.bfloat16, generator=generator) for h in heads
    ]


def _folded(lengths: tuple[int, ...]) -> FoldedPlan:
    return FoldedPlan(make_plan(lengths), make_fold(ParallelConfig(), "cuda"))


def _exact(device: torch.device, lengths: tuple[int, ...], mask: Mask) -> dict[str, Any]:
    """The rule of FlashAttention's own tests: no worse than a multiple of what bf16 costs dense attention."""
    q, k, v, grad = _inputs(device, sum(lengths))
    folded = _folded(lengths)
    visible = _dense_mask(lengths, mask, device)

    def results(dtype: torch.dtype, attend: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = attend(*leaves)
        return [x.double() for x in (out, *torch.autograd.grad(out, leaves, grad.to(dtype)))]

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = []
        for head in range(HEADS):  # one at a time: scores of all would not fit in fp64
            key = head // (HEADS // KV_HEADS)
            scores = (q[:, head] @ k[:, key].mT * SCALE).masked_fill(~visible, -torch.inf)
            outs.append(scores.softmax(-1) @ v[:, key])
        return torch.stack(outs, 1)

    reference, plain = results(torch.float64, dense), results(torch.bfloat16, dense)
    ours = results(torch.bfloat16, lambda q, k, v: folded.attend(q, k, v, SCALE, mask))
    errors = [[relative_error(x, y, scale=1) for x, y in zip(found, reference, strict=True)] for found in (ours, plain)]
    ratios = [mine / theirs for mine, theirs in zip(*errors, strict=True)]
    names = ("out", "dq", "dk", "dv")
    each = {f"{name}": f"{ratio:.2f}" for name, ratio in zip(names, ratios, strict=True)}
    return {"lengths": str(lengths), "mask": str(tuple(mask)), **each, "ratio": max(ratios)}


def _dense_mask(lengths: tuple[int, ...], mask: Mask, device: torch.device) -> Tensor:
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    i = torch.arange(len(document), device=device)
    seen = document[:, None] == document
    if mask.causal:
        seen &= i[:, None] >= i
        seen &= i[:, None] - i < (mask.window or len(i))
    return seen


def _layer(device: torch.device, lengths: tuple[int, ...], peak: float | None) -> Iterator[dict[str, Any]]:
    """Attention of one layer, by each way that there is to compute it."""
    q, k, v, grad = _inputs(device, sum(lengths))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    work = 3 * 4 * HEADS * HEAD_DIM * visible_pairs(lengths, Mask())
    folded = _folded(lengths)

    def kernel() -> None:
        start = 0
        for length in lengths:
            rows = slice(start, start := start + length)
            qs, ks, vs = (x.detach()[:, :, rows] for x in (q, k, v))
            out, lse = block_forward(qs, ks, vs, "causal", SCALE)
            block_backward(grad[:, :, rows], qs, ks, vs, out, lse, "causal", SCALE)

    def through_autograd(attend: Callable[..., Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(attend(*leaves), leaves, grad)

    def sdpa(backend: SDPBackend) -> Callable[[], Any]:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE, enable_gqa=True)

        return through_autograd(attend)

    contenders: dict[str, Callable[[], Any]] = {
        "longvila": through_autograd(lambda q, k, v: folded.attend(q, k, v, SCALE)),
        "one kernel call" if len(lengths) == 1 else "a kernel call per document": kernel,
    }
    if len(lengths) == 1:
        contenders["torch, FlashAttention 2"] = sdpa(SDPBackend.FLASH_ATTENTION)
        contenders["torch, cuDNN"] = sdpa(SDPBackend.CUDNN_ATTENTION)
    for name, call in contenders.items():
        seconds = _seconds(call, REPEATS)
        yield {
            "tokens": sum(lengths), "contender": name, "ms": seconds * 1e3, "TFLOP/s": work / seconds / 1e12,
            "MFU": None if peak is None else work / seconds / peak,
        }  # fmt: skip


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median time on the device, after a call that warms up."""
    times = []
    for _ in range(repeats + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times[1:])


def _train(device: torch.device, shape: Shape, peak: float | None) -> Iterator[dict[str, Any]]:
    """Whole optimizer steps, and the operators that take most of one."""
    state = _state(device, shape)
    for tokens in STEP_LENGTHS:
        step = _step(tokens, shape.vocabulary)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        row = {"shape": shape.name, "tokens": tokens}
        try:
            seconds = _seconds(lambda step=step: take_step(state, step, RATE), STEPS)
            with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as recorder:
                take_step(state, step, RATE)
                torch.cuda.synchronize()
        except torch.cuda.OutOfMemoryError:
            yield {**row, "step_s": None, "TFLOP/s": None, "MFU": None, "peak_GiB": None, "top": "out of memory"}
            continue
        work = state.flops.of_row(step.rows[0])
        yield {
            **row, "step_s": seconds, "TFLOP/s": work / seconds / 1e12,
            "MFU": None if peak is None else work / seconds / peak,
            "peak_GiB": torch.cuda.max_memory_allocated() / 2**30, "top": _top(recorder),
        }  # fmt: skip


def _state(device: torch.device, shape: Shape) -> TrainingState:
    parallel = ParallelConfig()
    config = StageConfig(
        name="bench", scale="bench", starts_from=None, model=ModelConfig("bench", None, "bench"),
        trains=("language_model",), phases=(), optimizer=OptimizerConfig(), parallel=parallel, precision="bf16",
        recompute="save_attention", tile_tokens=TILE,
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        model = wrap(Qwen2ForCausalLM(shape.config()))
    choose_trained(model, config.trains)
    fold = make_fold(parallel, device.type)
    flops = count_flops(model)
    parameters = count_parameters(model)
    engine = make_engine(model, fold, config)
    return TrainingState(config, fold, device, engine, cast(Any, None), flops, parameters)


def _step(tokens: int, vocabulary: int) -> Step:
    ids = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(1))
    frames = torch.zeros((0, 3, TOWER["image_size"], TOWER["image_size"]), dtype=torch.uint8)
    lengths = (tokens,)
    row = Row(ids, shift_labels(ids, lengths), torch.arange(tokens), lengths, ("row",), (0,), frames, ())
    return Step((row,), tokens - 1, 0)


def _top(recorder: profile) -> str:
    """The kernels that took most of the device's time, with their shares of it."""
    kernels = sorted(recorder.key_averages(), key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in kernels)
    names = [event.key.removeprefix("void ").replace("at::native::", "")[:70] for event in kernels[:TOP]]
    shares = [f"{event.self_device_time_total / total:.0%}" for event in kernels[:TOP]]
    return "; ".join(f"{share} {name}" for share, name in zip(shares, names, strict=True))
