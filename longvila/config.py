"""A run's whole configuration: typed, frozen, saved beside its checkpoints.

Stage files (`stages/`) return a `StageConfig`; everything below the builders takes plain values. `override` changes one
field by its dotted name, and `to_json` / `from_json` keep a configuration with the checkpoints it made.
"""

from __future__ import annotations

import dataclasses
import json
import os
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from longvila.errors import ConfigError

LayoutName = Literal["contiguous", "zigzag", "document_zigzag", "lightseq", "joint", "auto"]
RoutingName = Literal["direct", "relay"]
RecomputeName = Literal["none", "all", "save_attention", "offload_attention"]
PlacementName = Literal["head_first", "context_first"]
ScheduleName = Literal["1f1b", "zero_bubble"]
ScopeName = Literal["world", "node", "none"]
EngineName = Literal["fsdp2", "zero1", "zero2", "zero3"]
PARTS = ("vision", "projector", "language_model")


@dataclass(frozen=True)
class FrameSampling:
    """Which frames of a video the model sees."""

    mode: Literal["uniform", "fps"] = "fps"
    """`uniform`: `frames` frames spread over the video. `fps`: one every 1/fps seconds, at most `frames`."""
    frames: int = 8
    """The count (`uniform`) or the cap (`fps`; past the cap the frames are spread uniformly)."""
    fps: float = 1.0
    """Frames per second of video time, in `fps` mode."""
    tiles: int = 1
    """A still image is seen whole, and in at most so many tiles besides, each a frame; 1: whole alone."""


@dataclass(frozen=True)
class SourceConfig:
    """One stream of samples inside a mixture."""

    shards: str
    """A folder of webdataset tars, or a brace pattern of tars or their URLs; relative paths are below the data root of
    the run."""
    weight: float = 1.0
    """Relative rate at which samples come from here, while this source lasts (see `DataConfig.weigh`)."""
    repeat: float = 1.0
    """How often its samples come in an epoch: 2 is twice each, 0.5 half of them, chosen anew each time."""
    limit: int | None = None
    """Samples from here in an epoch, at most."""


@dataclass(frozen=True)
class DataConfig:
    """How shards become packed rows of tokens."""

    sources: tuple[SourceConfig, ...]
    frames: FrameSampling = FrameSampling()
    row_tokens: int = 4096
    """Token budget of one packed row (one row per sequence group and micro-batch)."""
    window: int = 4096
    """Samples shuffled and packed together. (Without an index: shuffled, and at most 256 of them.)"""
    weigh: Literal["samples", "tokens"] = "samples"
    """What the weights of the sources share out."""
    workers: int = 0
    """Decoding processes of each rank; 0 decodes in the training process, which a broken decoder can then take down."""
    prefetch: int = 2
    """Rows that the decoding processes work on ahead of the one in use."""
    decode_timeout: float = 600.0
    """Seconds after which the decoding of one video counts as hung, and the video is dropped."""
    cache: str | None = None
    """The folder for copies of shards named by URL; by default below `~/.cache/longvila`."""
    cache_gib: float | None = None
    """GiB of such copies, past which those used longest ago are removed."""
    allow_pipes: bool = False
    """Sources may be commands that write a tar (`pipe:COMMAND`)."""
    max_bad_share: float = 0.05
    """The run stops when more than this share of the samples read (after the first 100) could not be used."""


@dataclass(frozen=True)
class ModelConfig:
    """What the vision-language model is made from, before any stage has run."""

    tower: str
    """An open_clip model name (`ViT-SO400M-14-SigLIP-384`) or the path of an open_clip JSON configuration."""
    tower_weights: str | None
    """An open_clip pretrained tag (`webli`), the path of a state dict, or None for random weights."""
    language_model: str
    """A Hugging Face causal language model, by hub name or folder."""
    projector: Literal["downsample_mlp", "mlp", "linear"] = "downsample_mlp"
    """`downsample_mlp` joins each 2x2 block of patches into one token; the others keep every patch."""
    chat_template: str | None = None
    """A Jinja template in place of the tokenizer's own, saved with the model: for a tokenizer that has none, or whose
    template writes earlier answers otherwise than the last (Qwen3's, which thinks)."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on the language model (Hu et al. 2021), merged at the end of the stage."""

    rank: int = 8
    alpha: int = 16
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    full: tuple[str, ...] = ("embed_tokens", "norm")
    """Parameters trained in full beside the adapters: every one with one of these words in its name (LongLoRA)."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate and weight decay."""

    match: str
    """A regular expression found in the parameters' names, e.g. `^vision\\.` or `layers\\.[0-3]\\.`."""
    rate: float = 1.0
    """Factor on the phase's learning rate."""
    weight_decay: float | None = None
    """For every parameter of the group; None is the optimizer's rule."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019) and gradient clipping."""

    weight_decay: float = 0.0
    """Applied to matrices; biases, norms and embeddings never decay."""
    groups: tuple[ParameterGroup, ...] = (ParameterGroup(""),)
    """A trained parameter belongs to the first group that matches its name, and must belong to one; the empty
    expression matches all."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip: float = 1.0
    """Bound of the global gradient norm; 0 turns clipping off (the norm is still reported)."""
    skip_norm: float | None = None
    """A step is skipped, weights and moments untouched, when its loss or gradient norm (before clipping) is not finite,
    or the norm is above this."""
    max_skipped: int = 10
    """Steps that may be skipped in a row before the run stops."""


@dataclass(frozen=True)
class ParallelConfig:
    """The fold of a sequence group (head x inner x outer x tensor ranks read a row together), and the experts' own."""

    head: int = 1
    """Ranks that split the attention heads of the same tokens (all-to-all, as DeepSpeed-Ulysses)."""
    inner: int = 1
    """Ranks of the inner ring, over which tokens are split."""
    outer: int = 1
    """Windows of the outer ring (LoongTrain's double ring). Tokens are split over inner x outer."""
    layout: LayoutName = "document_zigzag"
    """Which tokens each rank owns (`longvila/parallel/layout.py`); `auto` picks by predicted cost, row by row."""
    routing: RoutingName = "direct"
    """How keys travel: straight to whom they serve, or passed on round a ring or double ring."""
    placement: PlacementName = "head_first"
    """Which axis lies on neighbouring ranks, those of one node: heads, or the inner ring (LoongTrain, section 4.3)."""
    experts: int = 1
    """Neighbouring ranks that share out the experts of a mixture: a fold of its own over all ranks, whatever
    attention's is (MoE Parallel Folding)."""
    expert_tensor: int = 1
    """Neighbouring ranks that share out the matrices of each expert; the ranks of `experts` lie that far apart."""
    tensor: int = 1
    """Neighbouring ranks that share out the matrices of attention and MLPs (Megatron's tensor parallelism). Outside of
    these each has its own tokens, and a row is split over them too."""
    pipeline: int = 1
    """Stages of ranks, far apart, that share out the layers of the language model, the tower and the projector lying
    with the first. All that is said above is of the ranks of one stage. A step's rows follow one another through the
    stages, which keep weights gathered and gradients whole until the last row is through. Engine `fsdp2` alone."""
    chunks: int = 1
    """Stretches of layers that each rank of a pipeline holds; with more, the pipeline is interleaved: it fills faster
    and sends more."""
    stage_layers: tuple[int, ...] = ()
    """How many layers each stretch of a pipeline has, in their order, `pipeline` x `chunks` of them; none means as even
    as they go. The first and the last may have 0: the tower and the words, or the output matrix, are work too."""
    schedule: ScheduleName = "1f1b"
    """Of a pipeline: one forward, one backward (interleaved with more than one chunk), or `zero_bubble`, which does the
    gradients of weights apart from those of what layers take in, when there is nothing better to do."""

    @property
    def sequence(self) -> int:
        """Ranks in one sequence group."""
        return self.head * self.inner * self.outer * self.tensor


@dataclass(frozen=True)
class MixtureConfig:
    """What keeps the experts of a mixture in use while its routers are trained (`longvila/parallel/balance.py`)."""

    balance: float = 0.0
    """Factor of each layer's load-balancing loss."""
    z: float = 0.0
    """Factor of each layer's router z-loss."""
    over: Literal["world", "sequence"] = "world"
    """Whose tokens are balanced together: those of all ranks, or those of one row."""
    bias: float = 0.0
    """By how much the bias of an expert's score moves each step, towards balance and without a loss; for models whose
    routers have one."""
    capacity: float | None = None
    """At most this times an even share of a rank's choices goes to one expert, and the rest is dropped; None drops
    nothing."""
    keeps: Literal["probability", "position"] = "probability"
    """Which tokens a full expert keeps: those with the largest weights, or those first in the row."""
    pads: bool = False
    """Send each expert as many tokens as its capacity holds, zeros where there are fewer, so that sizes are fixed."""


@dataclass(frozen=True)
class ShardingConfig:
    """Over which ranks each kind of training state is sharded: all, those of a node, or not at all (LoongTrain's hybrid
    ZeRO). Less sharding costs memory (`longvila/train/memory.py` prints how much) and saves traffic."""

    optimizer: ScopeName = "world"
    """Master weights and AdamW's moments, and what every step leaves behind."""
    parameters: ScopeName = "world"
    """Weights between a block's forward and its backward; sharded at most as far as the optimizer's."""
    gradients: ScopeName = "world"
    """Gradients between the rows of a step: as the optimizer's, or `none` (whole until the last row, one reduction)."""
    node: int | None = None
    """Ranks of a node; None asks torchrun."""


@dataclass(frozen=True)
class Phase:
    """A stretch of a stage with its own data, length and learning rate. Most stages have one."""

    name: str
    steps: int
    data: DataConfig
    learning_rate: float
    schedule: Literal["constant", "cosine", "linear", "warmup_stable_decay"] = "cosine"
    """As transformers defines it. `warmup_stable_decay` falls over the last tenth of the steps."""
    warmup: float = 0.03
    """Share of the phase's steps over which the rate rises from 0."""
    floor: float = 0.0
    """Share of the rate at which a falling schedule ends."""
    rows_per_step: int | None = None
    """Rows of an optimizer step over all data ranks, each of which reads its share one after the other (gradient
    accumulation): a step is the same whatever their number. None takes one row for each."""
    rope_theta: float | None = None
    """RoPE base from this phase on; None keeps what the model has."""


@dataclass(frozen=True)
class ValidationConfig:
    """Loss on data that does not train, measured now and then."""

    data: DataConfig
    rows: int = 8
    """Over all data ranks, the same ones every time."""
    every: int = 200
    """Steps between two measurements; the last step is followed by one in any case."""


@dataclass(frozen=True)
class StageConfig:
    """One training stage, complete."""

    name: str
    """The name of its file in `stages/`, e.g. `1_alignment`."""
    scale: str
    starts_from: str | None
    """The stage of the same run whose final model this one continues, or the path of a model's folder; None starts from
    the base models in `model`."""
    model: ModelConfig
    trains: tuple[Literal["vision", "projector", "language_model"], ...]
    """The parts whose parameters move. The run prints and asserts it."""
    phases: tuple[Phase, ...]
    freezes: tuple[str, ...] = ()
    """Parameters of those parts that do not move: all whose names hold a match of one of these regular expressions."""
    validation: ValidationConfig | None = None
    lora: LoraConfig | None = None
    optimizer: OptimizerConfig = OptimizerConfig()
    parallel: ParallelConfig = ParallelConfig()
    mixture: MixtureConfig = MixtureConfig()
    """Of language models that are mixtures of experts, under the engine `fsdp2`."""
    sharding: ShardingConfig = ShardingConfig()
    """Of the engine `fsdp2`; the others have their stage for it."""
    engine: EngineName = "fsdp2"
    """torch's FSDP2, or a stage of DeepSpeed's ZeRO. They give the same weights."""
    deepspeed_json: str | None = None
    """A DeepSpeed configuration file for the ZeRO engines (offload, buckets ...); it must not contradict this one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Computation type; master weights and optimizer states stay fp32."""
    recompute: RecomputeName = "none"
    """Activation checkpointing of every language-model layer (`longvila/parallel/recompute.py`)."""
    recompute_keeps: tuple[int, ...] | None = None
    """Layers whose attention a policy that keeps attention keeps; None means all."""
    tile_tokens: int | None = None
    """Tokens that MLPs and norms of language-model layers take at a time, each tile computed again in the backward
    (`longvila/model/tile.py`); None means all at once."""
    checkpoint_every: int = 200
    """Steps between resumable checkpoints; 0 saves only at the end."""
    checkpoints_kept: int = 2
    checkpoint_async: bool = False
    """Whether training goes on while a checkpoint is written, from a copy in the memory of the CPU."""
    rank_timeout: float = 1800.0
    """Seconds that a rank waits for the others before the run ends with an error; more than the slowest save, or the
    decoding of the longest row, takes."""
    peak_flops: float | None = None
    """FLOP/s of one device at its best, for MFU; None looks its name up (`longvila/train/flops.py`)."""
    seed: int = 0

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)


def to_json(config: Any) -> str:
    """The configuration as JSON, readable by `from_json`."""
    return json.dumps(dataclasses.asdict(config), indent=2)


def from_json(cls: type, text: str) -> Any:
    """Inverse of `to_json` for the dataclass `cls`. Raises ConfigError on a field that `cls` does not have."""
    return _build(cls, json.loads(text), cls.__name__)


def override(config: Any, assignment: str) -> Any:
    """Returns `config` with one field replaced: `"optimizer.clip=0.5"`, `"phases.0.steps=10"`.

    Raises:
        ConfigError: for a field that does not exist (the fields that do are listed) or a value of another type.
    """
    name, separator, text = assignment.partition("=")
    if not separator:
        raise ConfigError(f"override '{assignment}' has no '='; write FIELD=VALUE, e.g. optimizer.clip=0.5")
    data = dataclasses.asdict(config)
    node: Any = data
    *parents, leaf = name.split(".")
    try:
        for key in parents:
            node = node[int(key)] if isinstance(node, (list, tuple)) else node[key]
        if not isinstance(node, dict) or leaf not in node:
            raise KeyError(leaf)
    except (KeyError, IndexError, ValueError, TypeError):
        if isinstance(node, dict):
            known = ", ".join(node)
        elif isinstance(node, (list, tuple)):
            known = f"indices 0 to {len(node) - 1}"
        else:
            known = f"nothing below {node!r}; set the whole field, as in lora='{{\"rank\": 8}}'"
        raise ConfigError(f"override '{name}': no such field; there is: {known}") from None
    try:
        node[leaf] = json.loads(text)
    except json.JSONDecodeError:
        node[leaf] = text
    return _build(type(config), data, type(config).__name__)


def differences(one: Any, other: Any, name: str = "") -> Iterator[str]:
    """The fields, by the names that `override` takes, in which two configurations differ. Of two paths it matters where
    they lead."""
    if dataclasses.is_dataclass(one) and type(one) is type(other):
        for field in dataclasses.fields(one):
            below = f"{name}.{field.name}" if name else field.name
            yield from differences(getattr(one, field.name), getattr(other, field.name), below)
    elif isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
        for number, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, f"{name}.{number}")
    elif isinstance(one, str) and isinstance(other, str):
        if os.path.abspath(one) != os.path.abspath(other):
            yield name
    elif one != other:
        yield name


def _build(annotation: Any, value: Any, where: str) -> Any:
    """Builds `annotation` from JSON data, checking every name and type on the way."""
    origin = typing.get_origin(annotation)
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        if not isinstance(value, dict):
            raise ConfigError(f"{where} must be an object with fields, not {value!r}")
        hints = typing.get_type_hints(annotation)
        if unknown := set(value) - set(hints):
            raise ConfigError(f"{where} has no field {sorted(unknown)}; it has {sorted(hints)}")
        return annotation(**{key: _build(hints[key], item, f"{where}.{key}") for key, item in value.items()})
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} must be a list, not {value!r}")
        kinds = typing.get_args(annotation)
        if kinds[-1] is not Ellipsis and len(kinds) != len(value):
            raise ConfigError(f"{where} takes {len(kinds)} values, not {len(value)}")
        return tuple(
            _build(kinds[0] if kinds[-1] is Ellipsis else kinds[i], item, f"{where}[{i}]")
            for i, item in enumerate(value)
        )
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in typing.get_args(annotation):
            return None
        (kind,) = [k for k in typing.get_args(annotation) if k is not type(None)]
        return _build(kind, value, where)
    if origin is Literal:
        if value not in typing.get_args(annotation):
            raise ConfigError(f"{where} is {value!r}; it must be one of {list(typing.get_args(annotation))}")
        return value
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    kind: Any = annotation
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{where} must be {kind.__name__}, not {value!r}")
    return value
