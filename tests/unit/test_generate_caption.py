"""Captions of a file and of a folder, with every unreadable file named."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from longvila.config import FrameSampling
from longvila.errors import ConfigError, DataError, MediaError
from longvila.generate.answer import Answerer
from longvila.generate.caption import caption, open_film

from .eval_parts import tiny_answerer
from .model_parts import qwen3
from .video_fixtures import make_mosaic, make_video, read_number, write

SAMPLING = FrameSampling("uniform", frames=3)


@pytest.fixture
def answerer(tmp_path: Path) -> Answerer:
    return tiny_answerer(tmp_path / "base")


def test_a_video_is_captioned_in_pieces_that_join_to_the_caption(answerer, tmp_path):
    film = tmp_path / "film.mp4"
    film.write_bytes(make_video(8))
    pieces: list[str] = []
    report = caption(answerer, film, SAMPLING, "What?", max_new_tokens=8, on_text=pieces.append)
    assert report.captions == {film: "".join(pieces).strip()}
    assert report.captions[film]


def test_unreadable_files_of_a_folder_are_named_and_counted_and_the_rest_is_captioned(answerer, tmp_path):
    folder = tmp_path / "films"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "good.mp4").write_bytes(make_video(4))
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "page.mkv").write_text("<html>")
    (folder / "notes.txt").write_text("no video")
    Image.new("RGB", (40, 30)).save(folder / "still.png")
    failures: list[Path] = []
    report = caption(
        answerer, folder, SAMPLING, "What?", max_new_tokens=4, on_failure=lambda path, reason: failures.append(path)
    )
    assert [path.name for path in report.captions] == ["good.mp4", "still.png"]
    assert failures == list(report.failed) == [folder / "empty.mp4", folder / "page.mkv"]
    assert "empty.mp4" in report.failed[folder / "empty.mp4"]


def test_captions_are_written_one_by_one_and_those_a_file_has_are_not_made_again(answerer, tmp_path):
    folder, out = tmp_path / "films", tmp_path / "new" / "captions.jsonl"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.mp4").write_bytes(make_video(4))
    (folder / "c.mp4").write_bytes(b"")
    before: list[list[str]] = []

    def run(question: str, path: Path = folder):
        return caption(
            answerer,
            path,
            SAMPLING,
            question,
            max_new_tokens=4,
            on_file=lambda file: before.append(out.read_text().splitlines()),
            out=out,
        )

    report = run("What?")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines == [
        {"video": str(file), "question": "What?", "caption": text, "cut": True, "frames": 3}
        for file, text in report.captions.items()
    ]
    assert [path.name for path in report.captions] == ["a.mp4", "b.mp4"]
    assert [len(seen) for seen in before] == [0, 1]  # the first film's line is there when the second begins

    killed = out.read_text()[:-20]  # in the middle of the second line
    out.write_text(killed)
    report = run("What?")
    assert [path.name for path in report.known] == ["a.mp4"]
    assert [path.name for path in report.captions] == ["b.mp4"]
    assert json.loads(out.read_text().splitlines()[-1])["video"] == str(folder / "b.mp4")
    assert list(report.failed) == [folder / "c.mp4"]  # tried again, each time

    report = run("What?")
    assert (len(report.known), len(report.captions), len(report.failed)) == (2, 0, 1)
    assert run("What?", folder / "a.mp4").known == [folder / "a.mp4"]
    assert [path.name for path in run("Who?").captions] == ["a.mp4", "b.mp4"]
    with pytest.raises(MediaError, match=r"c\.mp4"):
        run("What?", folder / "c.mp4")


def test_a_file_of_something_else_gets_no_captions(answerer, tmp_path):
    film = tmp_path / "film.mp4"
    film.write_bytes(make_video(4))
    whole = film.read_bytes()
    with pytest.raises(ConfigError, match=r"film\.mp4: holds no captions"):
        caption(answerer, film, SAMPLING, out=film)
    assert film.read_bytes() == whole
    with pytest.raises(ConfigError, match="captions cannot be written there"):
        caption(answerer, film, SAMPLING, out=tmp_path)


def test_a_caption_is_cut_at_its_bound_alone(answerer, tmp_path):
    film, out = tmp_path / "film.mp4", tmp_path / "captions.jsonl"
    film.write_bytes(make_video(4))
    word, end = answerer.tokenizer("a")["input_ids"][0], answerer.tokenizer.eos_token_id
    cut: list[Path] = []
    for question, tokens in (("Cut?", [word] * 3), ("Whole?", [word, end])):
        forced = iter(tokens)
        answerer._cache = None  # what is forced leaves nothing in it to go on from
        answerer._next_token = lambda forced=forced, **inputs: next(forced)
        caption(answerer, film, SAMPLING, question, max_new_tokens=3, on_cut=cut.append, out=out)
    assert cut == [film]
    assert [(line["caption"], line["cut"]) for line in map(json.loads, out.read_text().splitlines())] == [
        ("aaa", True),
        ("a", False),
    ]


def test_an_image_is_seen_whole_and_in_tiles(tmp_path):
    picture = write(tmp_path / "picture.png", make_mosaic(2, 2))
    count, decode = open_film(picture, SAMPLING, 48)
    alone = decode(0, 1)
    assert (count, alone.shape) == (1, (1, 3, 48, 48))
    count, decode = open_film(picture, replace(SAMPLING, tiles=4), 48)
    whole, *tiles = decode(0, count)
    assert [read_number(tile) for tile in tiles] == [1, 2, 3, 4]
    assert torch.equal(decode(2, 4), torch.stack(tiles[1:3]))
    assert whole.equal(alone[0])


def test_a_single_unreadable_file_is_an_error_that_names_it(answerer, tmp_path):
    (tmp_path / "cut.mp4").write_bytes(make_video(8)[:200])
    with pytest.raises(MediaError, match=r"cut\.mp4"):
        caption(answerer, tmp_path / "cut.mp4", SAMPLING)


def test_a_folder_without_videos_and_a_path_that_is_not_there_are_refused(answerer, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    with pytest.raises(DataError, match=r"texts: no video or image in this folder"):
        caption(answerer, tmp_path / "texts", SAMPLING)
    with pytest.raises(ConfigError, match="nowhere: no such file or folder"):
        caption(answerer, tmp_path / "nowhere", SAMPLING)


def test_a_folder_where_every_file_fails_is_an_error(answerer, tmp_path):
    folder = tmp_path / "films"
    folder.mkdir()
    (folder / "empty.mp4").write_bytes(b"")
    with pytest.raises(DataError, match=r"none of its 1 files could be captioned.*empty\.mp4"):
        caption(answerer, folder, SAMPLING)


def test_a_question_longer_than_the_context_is_refused_with_the_numbers(tmp_path):
    answerer = tiny_answerer(tmp_path / "base", qwen3(max_position_embeddings=120))
    film = tmp_path / "film.mp4"
    film.write_bytes(make_video(8))
    with pytest.raises(DataError, match="context is 120 tokens"):
        caption(answerer, film, SAMPLING, "why " * 100, max_new_tokens=8)
