"""The runner: every request answered once, on any number of ranks, however often it is started."""

import json
import threading
from pathlib import Path
from types import ModuleType

import pytest
import torch

from longvila import content
from longvila.errors import ConfigError, DataError, MediaError
from longvila.evaluate import frames as frames_module
from longvila.evaluate.context import check_frames_fit
from longvila.evaluate.frames import FrameTokens
from longvila.evaluate.request import FrameRef, Request, evaluation_order, share_of_rank
from longvila.evaluate.runner import run_benchmark

from .eval_parts import ScriptedAnswerer, evaluation_folder, film, tiny_answerer
from .model_parts import qwen3
from .video_fixtures import make_video


def benchmark_of(requests: list[Request]) -> ModuleType:
    module = ModuleType("eval.made_up")
    module.requests = lambda data, **options: requests
    module.score = lambda requests, responses: {"answers": dict(responses)}
    return module


def questions(path: Path, count: int, first: int = 0) -> list[Request]:
    return [Request(f"q{i}", film(path, 0.0, 0.25 * (i % 8)), f"Question {i}?", 4) for i in range(first, first + count)]


@pytest.fixture
def video(tmp_path: Path) -> Path:
    path = tmp_path / "film.mp4"
    path.write_bytes(make_video(12))
    return path


def test_a_run_that_stopped_asks_only_what_is_missing_and_a_half_line_is_asked_again(video, tmp_path):
    module, out = benchmark_of(questions(video, 6)), tmp_path / "out"
    first = run_benchmark(module, ScriptedAnswerer(str.upper), tmp_path, out)
    path = out / "responses-0.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4]) + lines[4][:30])  # killed while writing the fifth
    again = ScriptedAnswerer(str.upper)
    second = run_benchmark(module, again, tmp_path, out)
    assert len(again.asked) == 2
    assert second["num_reused"] == 4
    assert second["answers"] == first["answers"] == {f"q{i}": f"QUESTION {i}?" for i in range(6)}
    third = ScriptedAnswerer(str.upper)
    run_benchmark(module, third, tmp_path, out)
    assert third.asked == []


def test_another_checkpoint_question_or_film_is_asked_anew(video, tmp_path):
    out = tmp_path / "out"
    run_benchmark(benchmark_of(questions(video, 2)), ScriptedAnswerer(), tmp_path, out)
    other = ScriptedAnswerer(lambda question: "B")
    other.fingerprint = "other"
    scores = run_benchmark(benchmark_of(questions(video, 2)), other, tmp_path, out)
    assert len(other.asked) == 2
    assert set(scores["answers"].values()) == {"B"}
    video.write_bytes(make_video(12, first_number=500))
    changed = ScriptedAnswerer()
    run_benchmark(benchmark_of(questions(video, 2)), changed, tmp_path, out)
    assert len(changed.asked) == 2


def test_ranks_share_the_requests_and_rank_zero_scores_all_of_them(video, tmp_path):
    module, out, world = benchmark_of(questions(video, 9)), tmp_path / "out", 3
    answerers = [ScriptedAnswerer(str.lower) for _ in range(world)]
    results: list[dict | None] = [None] * world

    def rank(index: int) -> None:
        results[index] = run_benchmark(module, answerers[index], tmp_path, out, rank=index, world=world, patience=20)

    threads = [threading.Thread(target=rank, args=(index,)) for index in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[1] is None
    assert results[2] is None
    assert list(results[0]["answers"]) == [f"q{i}" for i in range(9)]
    assert sorted(question for answerer in answerers for question in answerer.asked) == [
        f"Question {i}?" for i in range(9)
    ]
    assert all(answerer.asked for answerer in answerers)


def test_rank_zero_gives_up_on_a_rank_that_stopped_and_says_what_to_do(video, tmp_path):
    module = benchmark_of(questions(video, 9))
    with pytest.raises(DataError, match=r"of 9 answers are missing and none came for 0\.3 s.*run the same command"):
        run_benchmark(module, ScriptedAnswerer(), tmp_path, tmp_path / "out", rank=0, world=2, patience=0.3)


@pytest.mark.parametrize("world", [1, 2, 3, 7, 40])
def test_shares_cover_every_request_once_and_are_about_even(world):
    requests = evaluation_order(
        [Request(f"{n}-{k}", film(Path("f"), *map(float, range(n))), "?", 1) for n in (4, 16, 64) for k in range(10)]
    )
    shares = [share_of_rank(requests, rank, world) for rank in range(world)]
    assert [request for share in shares for request in share] == requests
    if world <= 7:
        assert max(map(len, shares)) <= 2 * len(requests) / world


def test_a_film_that_cannot_be_read_is_counted_and_named_and_the_others_are_answered(video, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a film")
    requests = [
        *questions(video, 2),
        Request("bad1", film(broken, 0.0), "?", 4),
        Request("bad2", film(broken, 1.0), "?", 4),
        Request("gone", film(tmp_path / "gone.mp4", 0.0), "?", 4),
    ]
    scores = run_benchmark(benchmark_of(requests), ScriptedAnswerer(), tmp_path, tmp_path / "out")
    assert set(scores["failed"]) == {"bad1", "bad2", "gone"}
    assert "broken.mp4" in scores["failed"]["bad2"]
    assert "gone.mp4" in scores["failed"]["gone"]
    assert scores["answers"] == {"q0": "A", "q1": "A", "bad1": None, "bad2": None, "gone": None}


def test_a_run_in_which_nothing_can_be_answered_is_an_error(tmp_path):
    requests = [Request("gone", film(tmp_path / "gone.mp4", 0.0), "?", 4)]
    with pytest.raises(DataError, match=r"none of the 1 requests could be answered.*gone\.mp4"):
        run_benchmark(benchmark_of(requests), ScriptedAnswerer(), tmp_path, tmp_path / "out")


def test_an_empty_benchmark_and_two_requests_of_one_id_are_refused(video, tmp_path):
    with pytest.raises(ConfigError, match="found nothing to ask"):
        run_benchmark(benchmark_of([]), ScriptedAnswerer(), tmp_path, tmp_path / "out")
    with pytest.raises(ConfigError, match="two requests have the id 'q0'"):
        run_benchmark(benchmark_of(questions(video, 1) * 2), ScriptedAnswerer(), tmp_path, tmp_path / "out")


def test_each_frame_is_encoded_once_and_a_film_is_read_in_one_pass(video, tmp_path, monkeypatch):
    calls = []
    decode = frames_module.decode_frames
    monkeypatch.setattr(frames_module, "decode_frames", lambda *args: calls.append(args[1]) or decode(*args))
    answerer = ScriptedAnswerer()
    requests = questions(video, 16)
    tokens = FrameTokens(answerer, requests)
    for request in requests:
        tokens(request.frames)
    assert answerer.num_encoded == 8
    assert len(calls) == 2  # what the first request needs, then the rest of the film


def test_a_small_cache_forgets_but_every_request_gets_its_frames(video):
    answerer = ScriptedAnswerer()
    requests = [Request(f"q{i}", film(video, *(0.25 * k for k in range(i, i + 5))), "?", 4) for i in range(6)]
    whole, small = FrameTokens(answerer, requests), FrameTokens(answerer, requests, max_bytes=3 * 12)
    for request in [*requests, *reversed(requests)]:
        assert torch.equal(whole(request.frames), small(request.frames))
    assert len(small._tokens) == 5  # of one request


@pytest.mark.parametrize("num_kept", [1, 5, 9])
def test_questions_about_one_film_encode_its_frames_once_however_small_the_cache(video, num_kept):
    answerer = ScriptedAnswerer()
    ahead = [Request("ahead", film(video, *(0.25 * k for k in range(8))), "?", 4)]
    tokens = FrameTokens(answerer, ahead, max_bytes=num_kept * 12)
    tokens(film(video, 0.0, 0.25, 0.5))
    refs = film(video, *(0.25 * k for k in range(7)))
    first, before = tokens(refs), answerer.num_encoded
    for _ in range(3):
        assert torch.equal(tokens(refs), first)
    assert answerer.num_encoded == before


def test_frames_come_in_the_order_of_the_request_images_among_them(video, tmp_path):
    folder = evaluation_folder(tmp_path / "data")
    image = FrameRef(str(folder / "needle" / "images" / "2.png"), None)
    refs = (*film(video, 0.5, 0.25), image, *film(video, 0.0, 0.5))
    tokens = FrameTokens(ScriptedAnswerer(), [])(refs)
    assert torch.equal(tokens[0], tokens[4])
    assert tokens[2, 0].tolist() == pytest.approx([160, 0, 0], abs=2)
    assert not torch.equal(tokens[1], tokens[3])


def test_a_damaged_frame_that_nobody_needs_yet_harms_no_request(video):
    late = Request("late", film(video, 500.0), "?", 4)
    tokens = FrameTokens(ScriptedAnswerer(), [late])
    assert tokens(film(video, 0.0)).shape == (1, 1, 3)
    with pytest.raises(MediaError):
        tokens(late.frames)


@pytest.mark.parametrize(
    ("ask", "options", "frames", "way_out"),
    [
        (lambda data, frames=9: None, {}, 6, "give -o frames=6"),
        (lambda data, frames=4: None, {"frames": 9}, 6, "give -o frames=6"),
        (lambda data, frames=(2, 5, 8): None, {}, 6, "give lengths of up to 5: -o frames=2,5"),
        (lambda data, frames=(2,): None, {"frames": (6, 8)}, 6, "give lengths of up to 5: -o frames=5"),
        (lambda data, frames=(2, 5, 8): None, {}, 1, "show at most 1 in each"),  # no room beside the needle
        (lambda data, **options: None, {}, 6, "show at most 6 in each"),
    ],
)
def test_frames_that_cannot_fit_are_told_at_once_with_the_way_out(tmp_path, ask, options, frames, way_out):
    answerer = ScriptedAnswerer(context=21 + 4 + 4 * frames + 3)  # a prompt of "?" has 21 tokens, its answer 4
    answerer.model.projector.tokens_per_frame = 4
    shown = film(tmp_path / "film.mp4", *map(float, range(9)))
    requests = [Request(f"q{count}", shown[:count], "?", 4) for count in (1, 7, 9)]
    with pytest.raises(ConfigError) as refused:
        check_frames_fit([*requests, Request("words", shown, "?" * 100, 4)], answerer, ask, options)
    assert str(refused.value) == (
        "2 of 4 prompts are too long for the model: they show up to 9 frames of 4 tokens, but beside its words and its "
        f"answer each can have {frames} in the model's context of {28 + 4 * frames} tokens; {way_out}"
    )
    check_frames_fit([Request("fits", shown[:frames], "?", 4)], answerer, ask, options)


def test_the_frames_that_a_refusal_names_are_the_most_that_every_question_can_have(tmp_path):
    data, videomme = evaluation_folder(tmp_path / "data"), content.load("eval", "videomme")
    answerer = tiny_answerer(tmp_path / "base", qwen3(max_position_embeddings=300))
    options = {"frames": 12, "fps": None}
    with pytest.raises(
        ConfigError, match=r"8 of 8 prompts are too long.* up to 12 frames of 4 .*; give -o frames=\d+"
    ) as refused:
        run_benchmark(videomme, answerer, data, tmp_path / "out", options=options)
    assert not (tmp_path / "out").exists()
    most = int(str(refused.value).rpartition("=")[2])
    scores = run_benchmark(videomme, answerer, data, tmp_path / "out", options={**options, "frames": most})
    assert not scores["failed"]
    with pytest.raises(ConfigError, match=rf"up to {most + 1} frames"):
        run_benchmark(videomme, answerer, data, tmp_path / "out", options={**options, "frames": most + 1})


def test_a_real_model_runs_each_benchmark_and_prompts_past_its_context_are_counted(tmp_path):
    data = evaluation_folder(tmp_path / "data")
    answerer = tiny_answerer(tmp_path / "base", qwen3(max_position_embeddings=500))
    out = tmp_path / "out"
    films = json.loads((data / "videomme.json").read_text())
    films[0]["questions"][0]["question"] = "Why? " * 100
    (data / "videomme.json").write_text(json.dumps(films))
    videomme = run_benchmark(content.load("eval", "videomme"), answerer, data, out / "v", options={"frames": 3})
    assert videomme["lmms_eval"]["overall"]["counted"] == 8
    assert list(videomme["failed"]) == ["001/001-1"]
    assert "context is 500 tokens" in videomme["failed"]["001/001-1"]
    options = {"frames": (2, 4), "depths": (0.0, 1.0), "answers": 2, "max_new_tokens": 3}
    needle = run_benchmark(content.load("eval", "needle"), answerer, data, out / "n", options=options)
    assert not needle["failed"]
    assert all((out / "n" / name).is_file() for example in needle["examples"] for name in example["frames"])
    assert json.loads((out / "n" / "scores.json").read_text()) == json.loads(json.dumps(needle))
    captions = run_benchmark(
        content.load("eval", "captioning"), answerer, data, out / "c", options={"max_new_tokens": 8, "frames": 2}
    )
    assert captions["num_films"] == 4
