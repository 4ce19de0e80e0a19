"""Folds: named views of one device mesh. The only place that makes process groups.

The world is `data x outer x inner x head x tensor`, the last fastest: tensor parallelism talks most, and then the
all-to-all over heads stays on neighbouring ranks (LoongTrain's head-first placement); context-first placement is the
order `data x head x outer x inner x tensor`. A sequence group is all but `data`: ranks that read one row together.

With a pipeline all of this, and the experts' fold, is that of the ranks of one stage, which are neighbours; ranks of a
pipeline have the same place in every stage, so that pipelines coincide in all folds.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from longvila.config import ParallelConfig, PlacementName, ShardingConfig
from longvila.errors import ConfigError

AXES = ("data", "outer", "inner", "head", "tensor")
EXPERT_AXES = ("copies", "experts", "expert_tensor")
PIPELINE = "pipeline"


@dataclass(frozen=True)
class Links:
    """Process groups by link class, so that fast and slow transfers do not queue behind each other."""

    inner: dist.ProcessGroup
    """This rank's inner ring."""
    outer: dist.ProcessGroup
    """All context ranks."""


@dataclass(frozen=True)
class Fold:
    """This rank's place in the world, and the process groups of the axes it takes part in."""

    mesh: DeviceMesh
    """The pipeline and the axes of `AXES`, in the order of the placement."""
    stage: dist.ProcessGroup
    """Ranks that hold the same layers: all, without a pipeline."""
    pipeline: dist.ProcessGroup
    """Ranks with the same place in every stage, first to last."""
    readers: dist.ProcessGroup
    """Ranks that read the same rows: sequence groups with the same place in every stage."""
    sequence: dist.ProcessGroup
    """Ranks that share one row."""
    context: dist.ProcessGroup
    """outer x inner ranks with this rank's heads."""
    links: Links
    """Where keys, values and queries travel between them."""
    experts: DeviceMesh | None
    """Axes `pipeline`, `copies`, `experts` and `expert_tensor`: ranks along the third share out a mixture's experts,
    along the last the matrices of each, and along `copies` hold the same. None where no part of experts is shared out.
    """
    return_links: Links
    """The same ranks; gradients and helpers' answers travel here, so that the two kinds of traffic never mix."""
    heads: dist.ProcessGroup
    """Ranks that share this rank's attention tokens."""
    tensor: DeviceMesh | None
    """Axes `pipeline`, `copies` and `tensor`: ranks along the last share out matrices, those along `copies` hold the
    same part.
    None where no matrix is shared out."""
    inner: int
    outer: int
    placement: PlacementName
    data_rank: int
    num_data: int

    @property
    def stage_number(self) -> int:
        """Which of the pipeline's stages this rank belongs to."""
        return dist.get_rank(self.pipeline)

    @property
    def num_stages(self) -> int:
        return dist.get_world_size(self.pipeline)

    @property
    def sequence_rank(self) -> int:
        return dist.get_rank(self.sequence)

    @property
    def num_sequence(self) -> int:
        return dist.get_world_size(self.sequence)

    @property
    def part(self) -> int:
        """Context rank."""
        return dist.get_rank(self.context)

    @property
    def parts(self) -> int:
        return dist.get_world_size(self.context)

    @property
    def head(self) -> int:
        return dist.get_rank(self.heads)

    @property
    def num_heads(self) -> int:
        """Size of the head axis."""
        return dist.get_world_size(self.heads)

    @property
    def num_tensor(self) -> int:
        """Size of the tensor axis."""
        return 1 if self.tensor is None else self.tensor["tensor"].size()

    @property
    def piece(self) -> int:
        """Which of the num_heads x num_tensor pieces of its context rank's tokens this rank owns outside attention."""
        return self.coordinates(self.sequence_rank)[1]

    def coordinates(self, sequence_rank: int) -> tuple[int, int]:
        """(context rank, piece) of a rank of the sequence group."""
        if self.placement == "context_first":
            neighbours, tensor = divmod(sequence_rank, self.num_tensor)
            head, part = divmod(neighbours, self.parts)
            return part, head * self.num_tensor + tensor
        part, piece = divmod(sequence_rank, self.num_heads * self.num_tensor)
        return part, piece


def start_world(timeout: float = 1800.0) -> torch.device:
    """Joins the process group that torchrun describes (or a world of one without it) and returns this rank's device.

    Args:
        timeout: seconds that a rank waits for another, in this group and all that `make_fold` makes.

    Raises:
        ConfigError: where `timeout` is not positive.
    """
    if timeout <= 0:
        raise ConfigError(f"rank_timeout is {timeout:g} s; ranks must be given time to wait for each other")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def world_timeout() -> timedelta:
    """How long the ranks of the world wait for each other. Groups do not inherit it: torch gives each 30 minutes."""
    assert dist.group.WORLD is not None
    return dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout


def check_world(parallel: ParallelConfig, world: int) -> int:
    """Returns the number of data ranks, or raises ConfigError where the fold does not fit the world."""
    if parallel.pipeline < 1 or parallel.chunks < 1 or world % parallel.pipeline:
        raise ConfigError(
            f"parallel.pipeline={parallel.pipeline} stages, of parallel.chunks={parallel.chunks} stretches of layers a "
            f"rank, do not divide the world of {world} ranks; both must be at least 1, and the stages a divisor of it"
        )
    stretches, layers = parallel.pipeline * parallel.chunks, parallel.stage_layers
    if parallel.pipeline == 1 and (parallel.chunks, parallel.schedule, layers) != (1, "1f1b", ()):
        raise ConfigError(
            f"parallel.chunks={parallel.chunks}, parallel.schedule={parallel.schedule} and parallel.stage_layers="
            f"{list(layers)} are of a pipeline, and parallel.pipeline is 1; leave them out, or give it more stages"
        )
    if layers and (len(layers) != stretches or min(layers) < 0 or 0 in layers[1:-1]):
        raise ConfigError(
            f"parallel.stage_layers={list(layers)} must be {stretches} numbers, for parallel.pipeline="
            f"{parallel.pipeline} stages of parallel.chunks={parallel.chunks} stretches, of which the first and the "
            f"last alone may be 0"
        )
    whole, world = world, world // parallel.pipeline
    ranks = f"world of {whole} ranks" if whole == world else f"{world} ranks of a stage"
    sizes = f"head {parallel.head} x inner {parallel.inner} x outer {parallel.outer} x tensor {parallel.tensor}"
    if min(parallel.head, parallel.inner, parallel.outer, parallel.tensor) < 1:
        raise ConfigError(f"every axis of a sequence group must be at least 1, not {sizes}")
    if world % parallel.sequence:
        raise ConfigError(
            f"a sequence group of {parallel.sequence} ranks ({sizes}) does not divide the {ranks}; "
            f"start a multiple of {parallel.sequence * parallel.pipeline}, or change parallel.*"
        )
    if min(parallel.experts, parallel.expert_tensor) < 1 or world % (parallel.experts * parallel.expert_tensor):
        matrices = f" x expert_tensor={parallel.expert_tensor}" if parallel.expert_tensor != 1 else ""
        raise ConfigError(
            f"parallel.experts={parallel.experts}{matrices} ranks that share experts do not divide the "
            f"{ranks}; use a divisor of it"
        )
    return world // parallel.sequence


Groups = dict[str, list[list[int]]]


def fold_groups(parallel: ParallelConfig, world: int) -> Groups:
    """The ranks of every process group that a fold has, by kind: for a kind, each rank is in one list. Pure arithmetic.

    `sequence`: ranks that share a row. `data`: ranks that have the same place in different sequence groups. `heads`:
    ranks that split the heads of the same tokens. `context`: ranks that have the same heads of different tokens; they
    are `outer` rings of `inner` ranks, and `ring` is one of those. `tensor`: ranks that share out matrices. With shared
    experts, `experts`: ranks that share them out; `expert_tensor`: ranks that share out the matrices of each; `copies`:
    ranks that hold the same. With a pipeline, `pipeline`: ranks that pass rows on; `stage`: ranks with the same layers;
    `readers`: ranks that read the same rows.

    Raises:
        ConfigError: where the fold does not fit the world.
    """
    sizes = {"data": check_world(parallel, world), **{axis: getattr(parallel, axis) for axis in AXES[1:]}}
    order, stages, world = _axes(parallel), parallel.pipeline, world // parallel.pipeline
    ranks = torch.arange(world).view([sizes[axis] for axis in order]).permute([order.index(axis) for axis in AXES])

    def along(*axes: str) -> list[list[int]]:
        kept = [AXES.index(axis) for axis in axes]
        others = [index for index in range(len(AXES)) if index not in kept]
        return sorted(ranks.permute([*others, *kept]).reshape(-1, math.prod(sizes[axis] for axis in axes)).tolist())

    groups = {
        "sequence": [sorted(group) for group in along(*AXES[1:])],
        "data": along("data"),
        "heads": along("head"),
        "context": along("outer", "inner"),
        "ring": along("inner"),
        "tensor": along("tensor"),
    }
    if parallel.experts * parallel.expert_tensor > 1:
        ranks = torch.arange(world).view(-1, parallel.experts, parallel.expert_tensor)
        for index, name in enumerate(EXPERT_AXES):
            groups[name] = sorted(ranks.movedim(index, -1).reshape(-1, ranks.shape[index]).tolist())
    if stages == 1:
        return groups
    starts = range(0, stages * world, world)
    readers = [[start + rank for start in starts for rank in group] for group in groups["sequence"]]
    groups = {
        kind: [[start + rank for rank in group] for start in starts for group in each] for kind, each in groups.items()
    }
    groups[PIPELINE] = [[start + rank for start in starts] for rank in range(world)]
    groups["stage"] = [list(range(start, start + world)) for start in starts]
    groups["readers"] = readers
    return groups


def share_between_nodes(groups: list[list[int]], node: int) -> float:
    """Of what each rank sends to all ranks of its group alike, itself among them, the share that leaves its node.

    Args:
        node: ranks of a node.
    """
    pairs = [(a // node, b // node) for group in groups for a in group for b in group]
    return sum(a != b for a, b in pairs) / len(pairs)


def experts_between_nodes(parallel: ParallelConfig, world: int, node: int) -> str | None:
    """What it costs that groups which share experts span nodes of `node` ranks, in words; None where none does."""
    groups = fold_groups(parallel, world).get("experts", [])
    spanning = sum(len({rank // node for rank in group}) > 1 for group in groups)
    if not spanning:
        return None
    return (
        f"{spanning} of {len(groups)} groups that share experts span nodes: routed evenly, "
        f"{share_between_nodes(groups, node):.0%} of what goes to experts leaves its node, in every layer and both "
        f"ways; experts x expert_tensor <= {node} avoids it"
    )


def make_fold(parallel: ParallelConfig, device_type: str) -> Fold:
    """Builds the mesh and this rank's groups. Collective: every rank of the world calls it.

    Raises:
        ConfigError: where the sequence group does not divide the world.
    """
    world = dist.get_world_size()
    num_data, groups = check_world(parallel, world), fold_groups(parallel, world)
    sizes = {"data": num_data, **{axis: getattr(parallel, axis) for axis in AXES[1:]}}
    stages, world = parallel.pipeline, world // parallel.pipeline
    mesh = _make_mesh(device_type, {PIPELINE: stages, **{axis: sizes[axis] for axis in _axes(parallel)}})
    sequence = _my_group(groups["sequence"])
    assert dist.group.WORLD is not None
    context, returns = _my_group(groups["context"]), _my_group(groups["context"])
    inner, inner_returns = context, returns
    if parallel.outer > 1:
        inner, inner_returns = _my_group(groups["ring"]), _my_group(groups["ring"])
    _open([sequence, context, returns, inner, inner_returns, mesh.get_group(PIPELINE)], device_type)
    experts = None
    if (shared := parallel.experts * parallel.expert_tensor) > 1:
        sizes = (world // shared, parallel.experts, parallel.expert_tensor)
        experts = _make_mesh(device_type, {PIPELINE: stages, **dict(zip(EXPERT_AXES, sizes, strict=True))})
    tensor = None
    if parallel.tensor > 1:
        copies = world // parallel.tensor
        tensor = _make_mesh(device_type, {PIPELINE: stages, "copies": copies, "tensor": parallel.tensor})
    return Fold(
        mesh=mesh,
        sequence=sequence,
        stage=_my_group(groups["stage"]) if stages > 1 else dist.group.WORLD,
        pipeline=mesh.get_group(PIPELINE),
        readers=_my_group(groups["readers"]) if stages > 1 else sequence,
        context=context,
        links=Links(inner, context),
        experts=experts,
        return_links=Links(inner_returns, returns),
        heads=mesh.get_group("head"),
        tensor=tensor,
        inner=parallel.inner,
        outer=parallel.outer,
        placement=parallel.placement,
        data_rank=mesh.get_local_rank("data"),
        num_data=num_data,
    )


def _open(groups: list[dist.ProcessGroup], device_type: str) -> None:
    """First use of groups over which transfers go. NCCL connects a group when it is first used, which all of its ranks
    must take part in; but a rank that has nothing to send or receive in a row takes no part in its transfers."""
    for group in dict.fromkeys(groups):
        dist.all_reduce(torch.zeros(1, device=device_type), group=group)


def _axes(parallel: ParallelConfig) -> tuple[str, ...]:
    """From the slowest to the fastest, along which ranks are neighbours."""
    return ("data", "head", "outer", "inner", "tensor") if parallel.placement == "context_first" else AXES


def check_sharding(sharding: ShardingConfig, world: int) -> int:
    """Returns the ranks of a node, or raises ConfigError where the choice cannot be carried out."""
    node = sharding.node or int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if node < 1 or world % node:
        raise ConfigError(
            f"nodes of {node} ranks do not divide the world of {world}; set sharding.node to a divisor of it"
        )
    order = ("none", "node", "world")
    if order.index(sharding.parameters) > order.index(sharding.optimizer):
        raise ConfigError(
            f"sharding.parameters={sharding.parameters} is finer than sharding.optimizer={sharding.optimizer}; weights "
            f"cannot be spread further than their masters, use the same or less"
        )
    if sharding.gradients not in ("none", sharding.optimizer):
        raise ConfigError(
            f"sharding.gradients={sharding.gradients} must be sharding.optimizer's ({sharding.optimizer}), or none"
        )
    return node


def parameter_mesh(sharding: ShardingConfig, device_type: str, stages: int = 1) -> DeviceMesh:
    """The parameter fold `replicate x shard` that the optimizer's scope asks for: all ranks, or all of a pipeline's
    stage, whatever they do else.

    Collective. The shard axis lies on neighbouring ranks, those of a node.
    """
    world = dist.get_world_size()
    if stages > 1:
        return _make_mesh(device_type, {PIPELINE: stages, "shard": world // stages})["shard"]
    node = check_sharding(sharding, world)
    shard = {"world": world, "node": node, "none": 1}[sharding.optimizer]
    if shard == world:
        return _make_mesh(device_type, {"shard": world})
    return _make_mesh(device_type, {"replicate": world // shard, "shard": shard})


def _make_mesh(device_type: str, sizes: dict[str, int]) -> DeviceMesh:
    mesh = init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    # A mesh takes no timeout. torch 2.14 made the function that sets one public; earlier ones have the old name alone.
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    for group in mesh.get_all_groups():
        set_timeout(world_timeout(), group)
    return mesh


def _my_group(members: list[list[int]]) -> dist.ProcessGroup:
    group, _ = dist.new_subgroups_by_enumeration(members, timeout=world_timeout())
    assert isinstance(group, dist.ProcessGroup), "every rank of the world is in one of the groups"
    return group
