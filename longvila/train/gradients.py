"""Shows that folds change nothing: loss and every parameter's gradient of a whole vision-language model, over every
mesh and layout, against one process.

The reference shares no code with the folds: Hugging Face's own attention under a dense mask, logits of the whole row,
plain cross-entropy on labels shifted here. Everything is fp64, so what is left is rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig, Qwen3Config, Qwen3MoeConfig

from longvila.apply import apply_folds
from longvila.config import LayoutName, ParallelConfig, RoutingName
from longvila.difference import relative_error
from longvila.model.loss import IGNORE
from longvila.model.vlm import LongVilaConfig, LongVilaModel
from longvila.parallel.agree import sum_over_world
from longvila.parallel.batch import even_share, shard_row, shift_labels
from longvila.parallel.choose import LAYOUTS
from longvila.parallel.fold import make_fold
from longvila.parallel.launch import run_ranks
from longvila.parallel.packed import whole

FRAME = 60
BOUND = 1e-11


@dataclass(frozen=True)
class Document:
    """One document of a test row: text, then frames, then text, of which the last `answer` tokens are targets."""

    before: int
    frames: int
    after: int
    answer: int


@dataclass(frozen=True)
class Case:
    """One fold to check, with a row for each data rank."""

    parallel: ParallelConfig
    world: int
    rows: tuple[tuple[Document, ...], ...] = field(default=())

    @property
    def name(self) -> str:
        p = self.parallel
        return f"{self.world // p.sequence}x{p.outer}x{p.inner}x{p.head} {p.layout} {p.routing}"


# Frames and text unevenly spread, single-token documents, a document without an answer, a row without any frame, and
# answers so few that on most meshes some rank has none.
MIXED = (Document(3, 5, 11, 4), Document(1, 0, 0, 0), Document(2, 1, 3, 1), Document(29, 0, 2, 1), Document(0, 2, 6, 0))
TEXT = (Document(3, 0, 14, 13), Document(7, 0, 1, 1))
VIDEO = (Document(2, 7, 3, 1),)


def cases(world: int) -> list[Case]:
    """Every factorisation of `world` into data x outer x inner x head, with every layout, and one relayed."""
    rows = (MIXED, TEXT, VIDEO, MIXED[::-1])
    sizes = [n for n in range(1, world + 1) if world % n == 0]
    variants: list[tuple[LayoutName, RoutingName]] = [(layout, "direct") for layout in LAYOUTS]
    variants.append(("document_zigzag", "relay"))
    return [
        Case(
            ParallelConfig(
                head, inner, outer, layout, routing, "context_first" if routing == "relay" else "head_first"
            ),
            world,
            rows[: world // (head * inner * outer)],
        )
        for head in sizes
        for inner in sizes
        for outer in sizes
        if world % (head * inner * outer) == 0
        for layout, routing in variants
    ]


def make_model(
    seed: int = 0, heads: tuple[int, int] = (6, 3), experts: int = 0, layers: int = 2, tied: bool = True,
    dense: Sequence[int] = (), text: PretrainedConfig | None = None,
) -> LongVilaModel:  # fmt: skip
    """A small vision-language model in fp64: 3-block ViT, 2x2 projector, Qwen3.

    Args:
        heads: of queries, and of keys.
        experts: in each layer, of which a token has 3; 0 makes the language model dense.
        layers: of the language model.
        tied: whether the output matrix is that of the words.
        dense: layers that have no experts even so.
        text: another language model, of 64 words and width 48, in the place of all that.
    """
    torch.manual_seed(seed)
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16, "mlp_ratio": 2.0}
    tower = {
        "name": "check",
        "model_cfg": {"embed_dim": 16, "vision_cfg": vision},
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3},
    }
    shape = {
        "vocab_size": 64, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": layers,
        "num_attention_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": 8, "tie_word_embeddings": tied,
    }  # fmt: skip
    if text is None and not experts:
        text = Qwen3Config(**shape)
    elif text is None:
        text = Qwen3MoeConfig(
            **shape,
            num_experts=experts,
            num_experts_per_tok=3,
            moe_intermediate_size=24,
            norm_topk_prob=True,
            mlp_only_layers=list(dense),
        )
    config = LongVilaConfig(tower=tower, projector="downsample_mlp", text_config=text, frame_token_id=FRAME)
    model = LongVilaModel(config).double().train()
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):  # routers begin with zeros, by which all tokens have the same experts
            torch.nn.init.normal_(parameter, std=0.5)
    model.language_model.set_experts_implementation("eager")  # the default, a grouped product, takes no fp64
    return model


@dataclass(frozen=True)
class WholeRow:
    """A row before anything is cut or shifted."""

    input_ids: Tensor
    """(N,)"""
    labels: Tensor
    """(N,), unshifted: the token itself where it is a target."""
    position_ids: Tensor
    """(N,)"""
    lengths: tuple[int, ...]
    frames: Tensor
    """uint8 (F, 3, S, S)"""


def make_row(documents: tuple[Document, ...], tokens_per_frame: int, size: int, seed: int) -> WholeRow:
    """A row of random tokens and frames."""
    generator = torch.Generator().manual_seed(seed)
    ids, labels = [], []
    for d in documents:
        text = torch.randint(0, FRAME, (d.before + d.after,), generator=generator)
        frames = torch.full((d.frames * tokens_per_frame,), FRAME)
        one = torch.cat([text[: d.before], frames, text[d.before :]])
        target = torch.full_like(one, IGNORE)
        target[len(one) - d.answer :] = one[len(one) - d.answer :]
        ids.append(one)
        labels.append(target)
    num_frames = sum(d.frames for d in documents)
    return WholeRow(
        input_ids=torch.cat(ids),
        labels=torch.cat(labels),
        position_ids=torch.cat([torch.arange(len(one)) for one in ids]),
        lengths=tuple(len(one) for one in ids),
        frames=torch.randint(0, 256, (num_frames, 3, size, size), generator=generator, dtype=torch.uint8),
    )


def reference(model: LongVilaModel, rows: list[WholeRow]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of all rows on one process, without any of the machinery under test."""
    model.language_model.set_attn_implementation("sdpa")
    total = sum(int((row.labels != IGNORE).sum()) - _first_targets(row) for row in rows)
    loss = torch.zeros((), dtype=torch.float64)
    for row in rows:
        embeddings = model.language_model.get_input_embeddings()(row.input_ids.clamp(max=FRAME - 1))
        if len(row.frames):
            tokens = model.projector(model.vision(row.frames)).flatten(0, 1)
            embeddings = embeddings.index_put((row.input_ids.eq(FRAME).nonzero().flatten(),), tokens)
        document = torch.repeat_interleave(torch.tensor(row.lengths))
        visible = (document[:, None] == document[None]).tril()
        logits = model.language_model(
            inputs_embeds=embeddings[None], position_ids=row.position_ids[None], attention_mask=visible[None, None],
            use_cache=False,
        ).logits[0]  # fmt: skip
        for one, target in zip(logits.split(row.lengths), row.labels.split(row.lengths), strict=True):
            loss = loss + F.cross_entropy(one[:-1], target[1:], ignore_index=IGNORE, reduction="sum") / total
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), {name: grad.clone() for name, grad in gradients.items()}


def _first_targets(row: WholeRow) -> int:
    """Targets that no token precedes in their document."""
    return sum(int(one[0] != IGNORE) for one in row.labels.split(row.lengths))


def folded(case: Case) -> dict[str, float]:
    """On every rank of a world: error of the loss and of each gradient, max |difference| / max |reference|."""
    fold = make_fold(case.parallel, "cpu")
    model = make_model()
    tokens_per_frame, size = model.projector.tokens_per_frame, model.vision.image_size
    rows = [make_row(documents, tokens_per_frame, size, seed) for seed, documents in enumerate(case.rows)]
    expected_loss, expected = reference(make_model(), rows)
    apply_folds(model, fold)
    row = rows[fold.data_rank]
    local = shard_row(
        row.input_ids, shift_labels(row.labels, row.lengths), row.position_ids, row.lengths,
        row.input_ids == FRAME, tokens_per_frame, fold, case.parallel.layout, case.parallel.routing,
    )  # fmt: skip
    share = even_share(len(row.frames), fold.sequence_rank, fold.num_sequence)
    output = model(
        input_ids=local.input_ids, frames=row.frames[share.start : share.stop], position_ids=local.position_ids,
        labels=local.labels, route=local.route, plan=local.plan,
    )  # fmt: skip
    (total,) = sum_over_world(float(output.num_targets))
    (output.loss_sum / total).backward()
    loss = sum_over_world(output.loss_sum.item())[0] / total
    errors = {"loss": relative_error(loss, expected_loss)}
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(expected[name]) if parameter.grad is None else whole(parameter.grad)
        errors[name] = relative_error(gradient, expected[name])
    return errors


def check(worlds: tuple[int, ...] = (1, 2)) -> dict:
    """Largest error over every mesh and layout of the given world sizes.

    Returns:
        {"max_error", "bound", "parameters", "cases": [{"fold", "loss_error", "gradient_error", "worst_parameter"}]}.
    """
    table, parameters = [], 0
    for world in worlds:
        for case in cases(world):
            errors = run_ranks(folded, world, case)[0]
            loss = errors.pop("loss")
            worst = max(errors, key=errors.__getitem__)
            parameters = len(errors)
            table.append(
                {"fold": case.name, "loss_error": loss, "gradient_error": errors[worst], "worst_parameter": worst}
            )
    return {
        "max_error": max(max(row["gradient_error"], row["loss_error"]) for row in table),
        "bound": BOUND,
        "parameters": parameters,
        "cases": table,
    }
