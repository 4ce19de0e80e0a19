"""Captions of a file and of a folder, with every unreadable file named."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from longvila.config import FrameSampling
from longvila.errors import ConfigError, DataError, MediaError
from longvila.generate.answer import Answerer
from longvila.generate.caption import caption, load_frames

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


def test_an_image_is_seen_whole_and_in_tiles(tmp_path):
    picture = write(tmp_path / "picture.png", make_mosaic(2, 2))
    assert load_frames(picture, SAMPLING, 48).shape == (1, 3, 48, 48)
    whole, *tiles = load_frames(picture, replace(SAMPLING, tiles=4), 48)
    assert [read_number(tile) for tile in tiles] == [1, 2, 3, 4]
    assert whole.equal(load_frames(picture, SAMPLING, 48)[0])


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
