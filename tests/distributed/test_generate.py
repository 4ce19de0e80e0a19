"""Prompts that ranks share: attention and answers are those of one process, and keys are shared out evenly."""

import itertools
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers

from longvila.bench.exact import dense_mask
from longvila.config import FrameSampling
from longvila.difference import relative_error
from longvila.errors import DataError, MediaError
from longvila.evaluate.runner import Request, run_benchmark
from longvila.generate import answer as answering
from longvila.generate.answer import Answerer
from longvila.generate.caption import caption
from longvila.parallel import cache as caches
from longvila.parallel.blocks import Mask
from longvila.parallel.cache import ShardedCache
from longvila.parallel.launch import RankError, run_cases, run_ranks
from longvila.parallel.traffic import counting

from ..unit.eval_parts import film, tiny_answerer
from ..unit.model_parts import qwen3, random_frames
from ..unit.test_generate_answer import longrope_model, questions, sliding_window_model
from ..unit.video_fixtures import make_video
from . import test_models

SCALE = 0.3
MASKS = (Mask(), Mask(window=1), Mask(window=3), Mask(window=8))
CHUNKS = (7, 1, 1, 12, 2, 1, 1, 1, 5, 3, 1)


def grow(heads, crops, dtype=torch.float64):
    """Errors of a sequence that grows by `CHUNKS`, cut back to other lengths in between, in layers of every mask."""
    torch.manual_seed(0)
    total, group = sum(CHUNKS), heads[0] // heads[1]
    inputs = [torch.randn(1, count, total, 8, dtype=torch.float64) for count in (heads[0], heads[1], heads[1])]
    q, k, v = inputs[0], *(x.repeat_interleave(group, 1) for x in inputs[1:])
    cache, worst, chunks = ShardedCache(dist.group.WORLD), 0.0, list(CHUNKS)
    while chunks:
        start, count = cache.length, chunks.pop(0)
        mine = cache.begin(count)
        brought = mine or range(1)
        local = [x[:, :, brought.start : brought.stop].to(dtype) for x in inputs]
        seen = [x[:, :, : start + count] for x in (q, k, v)]
        for layer, mask in enumerate(MASKS):
            visible = dense_mask((start + count,), mask)
            expected = F.scaled_dot_product_attention(*seen, attn_mask=visible, scale=SCALE)
            found = cache.attend(*local, SCALE, mask, layer)
            assert found.dtype == dtype
            if mine:
                worst = max(worst, relative_error(found.double(), expected[:, :, mine.start : mine.stop], 1.0))
        if cache.length in crops:
            length = crops.pop(cache.length)
            chunks.insert(0, cache.length - length)
            cache.crop(length)
    return worst, cache.length, cache.num_held, {x.shape[1] for held in cache._held.values() for x in held}


CROPS = ({}, {21: 20, 24: 1, 30: 13}, {7: 0, 9: 8, 35: 34})


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_attention_of_every_chunk_is_that_of_one_process(ranks):
    cases = [(heads, dict(crops)) for heads in ((4, 2), (6, 2), (3, 3)) for crops in CROPS]
    for case, by_rank in zip(cases, run_cases(grow, ranks, cases), strict=True):
        (heads, _), total = case, sum(CHUNKS)
        assert max(error for error, *_ in by_rank) < 1e-12, case
        assert {length for _, length, *_ in by_rank} == {total}
        assert sum(held for _, _, held, _ in by_rank) == total
        assert {kept for *_, each in by_rank for kept in each} == {heads[1]}  # keys as they come, each head once


def test_bf16_stays_within_its_rounding():
    for error, *_ in run_ranks(grow, 3, (4, 2), {}, torch.bfloat16):
        assert error < 0.05


def grow_evenly(chunk, number):
    cache = ShardedCache(dist.group.WORLD)
    for _ in range(number):
        mine = cache.begin(chunk)
        x = torch.zeros(1, 2, len(mine), 8)
        cache.attend(x, x, x, 1.0, Mask(), 0)
    with counting() as counts:
        mine = cache.begin(chunk)
        x = torch.zeros(1, 4, len(mine), 8)
        cache.attend(x, x[:, :2], x[:, :2], 1.0, Mask(), 0)
    room = max((x.shape[2] for held in cache._held.values() for x in held), default=0)
    return cache.num_held, room, counts, len(cache._before)


def test_each_rank_holds_its_share_and_sends_queries_and_answers_only():
    for held, room, counts, _ in run_ranks(grow_evenly, 4, 12, 9):
        assert held == 30  # of 120
        assert room <= 30 * caches.GROWTH
        # Queries of 3 tokens to 3 others; of 9 tokens of others, an output and its log-sum-exp, back.
        assert counts["bytes queries"] == 3 * 3 * 4 * 8 * 4
        assert counts["bytes answers"] == 9 * 4 * (8 + 1) * 4
        assert sum(size for name, size in counts.items() if name.startswith("bytes")) == 1152 + 1296


def test_tokens_that_follow_each_other_on_a_rank_are_one_run():
    *_, (held, _, _, runs) = run_ranks(grow_evenly, 3, 1, 50)
    assert (held, runs) == (51, 1)  # the last rank has every token that comes alone


def misuse(kind):
    cache = ShardedCache(dist.group.WORLD)
    cache.begin(4)
    x = torch.zeros(1, 1, 4, 8)
    if kind == "twice":
        cache.attend(x, x, x, 1.0, Mask(), 0)
        cache.attend(x, x, x, 1.0, Mask(), 0)
    elif kind == "tokens":
        cache.attend(x[:, :, 1:], x[:, :, 1:], x[:, :, 1:], 1.0, Mask(), 0)
    elif kind == "types":
        cache.attend(x.double(), x, x, 1.0, Mask(), 0)
    elif kind == "number":
        cache.attend(x, x, x, 1.0, Mask())
    else:
        cache.attend(x, x, x, 1.0, Mask(causal=False), 0)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("twice", r"layer 0 brings 4 tokens .* layers \[0\] have asked"),
        ("tokens", "layer 0 brings 3 tokens to a chunk of which this rank has 4"),
        ("types", "q, k and v must have one type"),
        ("number", "layer -1 brings 4 tokens"),
        ("later", "tokens that see later ones cannot be generated"),
    ],
)
def test_what_would_be_wrong_is_refused(kind, words):
    with pytest.raises(RankError, match=f"ConfigError: {words}"):
        run_ranks(misuse, 1, kind)


# Faults, each of which must show.


def merge_without_weights():
    real = caches.ShardedCache._collect
    caches.ShardedCache._collect = lambda self, out, lse: real(self, out, torch.zeros_like(lse))


def keys_in_another_order():
    real = caches.ShardedCache._extend

    def extend(self, layer, k, v):
        keys, values = real(self, layer, k, v)
        return keys, values.roll(1, 2)

    caches.ShardedCache._extend = extend


def windows_see_the_open_chunk_alone():
    real = caches.ShardedCache._find_blocks

    def find_blocks(self, mask):
        found, before = real(self, mask), self.num_held - (self._mine[1] - self._mine[0])
        return found if mask.window is None else [block for block in found if block.k[0] >= before]

    caches.ShardedCache._find_blocks = find_blocks


def growing_loses_what_was_held():
    real = caches.ShardedCache._extend

    def extend(self, layer, k, v):
        before = self._held.get(layer)
        found = real(self, layer, k, v)
        if before is not None and before[0].shape != self._held[layer][0].shape:
            found[0][:, :, : -k.shape[2] or None] = 0
        return found

    caches.ShardedCache._extend = extend


def grow_with(fault):
    fault()
    return grow((4, 2), dict(CROPS[1]))[0]


@pytest.mark.parametrize(
    "fault",
    [
        merge_without_weights,
        keys_in_another_order,
        windows_see_the_open_chunk_alone,
        growing_loses_what_was_held,
    ],
)
def test_a_fault_is_seen(fault):
    assert max(run_ranks(grow_with, 2, fault)) > 1e-3


# Whole answers.


def gemma3():
    torch.manual_seed(0)
    return transformers.Gemma3ForCausalLM(test_models.MODELS["gemma3"](vocab_size=259, initializer_range=0.2))


def mixture():
    torch.manual_seed(0)
    config = test_models.MODELS["qwen3_moe"](vocab_size=259, initializer_range=0.2)
    return transformers.Qwen3MoeForCausalLM(config)


MODELS = {"qwen3": qwen3, "mistral": sliding_window_model, "gemma3": gemma3, "qwen3_moe": mixture}


def noting(answerer):
    """Logits behind a prompt and behind each token of its answer, as they are found from now on."""
    found, real, seen = [], answerer._next_token, []
    answerer.model.language_model.register_forward_hook(lambda _, __, out: seen.append(out.logits[0, -1:].double()))

    def next_token(**inputs):
        token = real(**inputs)
        if "inputs_embeds" in inputs and found and found[-1][0]:
            found.pop()  # there was more of the prompt
        found.append(("inputs_embeds" in inputs, seen[-1]))
        return token

    answerer._next_token = next_token
    return found


def answer_all(name, plain):
    """To each question, the answer and the logits of its tokens, in fp64; and the tokens held in the end."""
    answering.PREFILL_TOKENS = 7
    model = plain.model.double()
    if name == "qwen3_moe":
        model.language_model.set_experts_implementation("eager")  # the default, a grouped product, takes no fp64
    answerer = Answerer(model, plain.tokenizer, dist.group.WORLD)
    found, answers = noting(answerer), []
    for frames, question in questions():
        answers.append((answerer.answer(frames, question, 9), [logits for _, logits in found]))
        found.clear()
    held = answerer._cache.num_held if isinstance(answerer._cache, ShardedCache) else None
    return answers, held


@pytest.mark.parametrize("name", MODELS)
def test_answers_and_logits_are_those_of_one_process(name, tmp_path):
    plain = tiny_answerer(tmp_path / "base", MODELS[name]())
    ((alone, held),) = run_ranks(answer_all, 1, name, plain)
    assert held is None
    assert any(answer for answer, _ in alone)
    bound = 1e-5 if name == "gemma3" else 1e-11  # it takes its norms in fp32
    for ranks in (2, 3):
        by_rank = run_ranks(answer_all, ranks, name, plain)
        for answers, _ in by_rank:
            assert [answer for answer, _ in answers] == [answer for answer, _ in alone]
        for (_, mine), (_, expected) in zip(by_rank[-1][0], alone, strict=True):  # the last rank finds the tokens
            assert max(relative_error(*pair) for pair in zip(mine, expected, strict=True)) < bound
        held = [held for _, held in by_rank]
        assert max(held) - min(held) <= 12 + 9  # as many as there were chunks and tokens of the answer


def shared(plain):
    return Answerer(plain.model, plain.tokenizer, dist.group.WORLD)


def test_models_whose_prompts_cannot_be_shared_are_refused(tmp_path):
    with pytest.raises(RankError, match=r"RoPE type 'longrope', .* can be shared by 1 rank, not 2"):
        run_ranks(shared, 2, tiny_answerer(tmp_path / "base", longrope_model()))


def shared_on_a_gpu(plain):
    with mock.patch.object(type(plain.model), "device", torch.device("cuda")):
        shared(plain)


def test_weights_that_flash_attention_does_not_take_are_refused_before_any_film_is_opened(tmp_path):
    with pytest.raises(RankError, match=r"bf16 or fp16 on a GPU, not torch\.float32; give --dtype bf16"):
        run_ranks(shared_on_a_gpu, 2, tiny_answerer(tmp_path / "base"))


def share_film(plain):
    """Which frames of a film of five a rank decodes, and of one of a single frame."""
    answerer, frames, decoded = shared(plain), random_frames(5), []

    def decode(start, stop):
        decoded.append((start, stop))
        return frames[start:stop]

    tokens = answerer.encode_film(lambda: (5, decode))
    expected = answerer.model.encode_frames(frames)
    torch.testing.assert_close(tokens, expected)
    one = answerer.encode_film(lambda: (1, decode))  # less than a frame for each rank
    torch.testing.assert_close(one, expected[:1])
    return decoded


def test_ranks_share_out_the_frames_of_a_film(tmp_path):
    assert run_ranks(share_film, 2, tiny_answerer(tmp_path / "base")) == [[(0, 2)], [(2, 5), (0, 1)]]


def fail_to_read(plain, kind):
    """The second rank cannot open a film, or decode it, or finds another number of frames in it."""
    answerer, is_second = shared(plain), dist.get_rank() == 1

    def decode(start, stop):
        if is_second and kind == "decode":
            raise MediaError("film.mp4: broken")
        return random_frames(stop - start)

    def open_film():
        if is_second and kind == "open":
            raise MediaError("film.mp4: broken")
        return 3 + (is_second and kind == "count"), decode

    with pytest.raises(DataError) as caught:
        answerer.encode_film(open_film)
    return caught.type, str(caught.value)


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("open", MediaError, "film.mp4: broken"),
        ("decode", MediaError, "film.mp4: broken"),
        ("count", DataError, "ranks that share a film found [3, 4] frames in it; they must read the same file"),
    ],
)
def test_what_one_rank_cannot_read_is_an_error_on_all(kind, error, words, tmp_path):
    assert run_ranks(fail_to_read, 2, tiny_answerer(tmp_path / "base"), kind) == [(error, words)] * 2


def evaluate(folder, plain, ranks):
    """A benchmark of four questions about two films, one of them broken, and captions; by groups of `ranks`."""
    groups = [dist.new_group(list(range(start, start + ranks))) for start in range(0, dist.get_world_size(), ranks)]
    rank = dist.get_rank() // ranks
    answerer = Answerer(plain.model, plain.tokenizer, groups[rank])
    requests = [
        Request(f"{name} {index}", film(folder / name, 0, 1, index), f"Question {index}?", 5)
        for name, index in itertools.product(("film.mp4", "broken.mp4"), (2, 3))
    ]
    benchmark = SimpleNamespace(
        __name__="eval.mine", requests=lambda data: requests, score=lambda r, said: {"said": said}
    )
    out = folder / f"out-{ranks}"
    scores = run_benchmark(benchmark, answerer, folder, out, rank=rank, world=len(groups))
    captions = None
    if ranks == dist.get_world_size():
        report = caption(answerer, folder / "films", FrameSampling("fps", 4), out=folder / f"captions-{ranks}.jsonl")
        captions = {path.name: text for path, text in report.captions.items()}, len(report.failed)
    return scores, captions


def test_benchmarks_and_captions_are_the_same_whoever_shares_their_prompts(tmp_path):
    (tmp_path / "films").mkdir()
    for path in (tmp_path / "film.mp4", tmp_path / "films" / "a.mp4", tmp_path / "films" / "b.mp4"):
        path.write_bytes(make_video(5, fps=1, first_number=len(path.name)))
    for path in (tmp_path / "broken.mp4", tmp_path / "films" / "c.mp4"):
        path.write_bytes(b"no film")
    plain = tiny_answerer(tmp_path / "base")
    ((alone, captions),) = run_ranks(evaluate, 1, tmp_path, plain, 1)
    (tmp_path / "out-1").rename(tmp_path / "alone")
    for world, ranks in ((2, 2), (4, 2)):
        (scores, found), *others = run_ranks(evaluate, world, tmp_path, plain, ranks)
        assert scores["said"] == alone["said"]
        assert sum(said is None for said in alone["said"].values()) == 2
        assert list(scores["failed"]) == list(alone["failed"])
        assert all(each is None for each, _ in others)
        files = sorted(path.name for path in (tmp_path / "out-2").glob("responses-*"))
        assert files == [f"responses-{number}.jsonl" for number in range(world // ranks)]
        lines = [line for name in files for line in (tmp_path / "out-2" / name).read_text().splitlines()]
        assert len(lines) == 4
        if world == ranks:
            assert found == captions == others[0][1]
            one, other = ((tmp_path / f"captions-{n}.jsonl").read_text() for n in (1, 2))
            assert one == other
            assert len(other.splitlines()) == 2
        for path in (tmp_path / "out-2").iterdir():
            path.unlink() if path.is_file() else None
