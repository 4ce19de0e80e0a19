"""What benchmarks read: files of films by name, options in their range, and JSON whose faults are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from longvila.errors import ConfigError
from longvila.evaluate.files import check_fields, read_json, read_json_lines, read_json_list
from longvila.evaluate.films import film_refs, film_sampling, find_film


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two folders: films with files beside them, and one more film."""
    names = ("clip.a.mp4", "clip.mp4", "001.info.json", "001.mp4", "take [1].mp4", "two.mkv", "two.MP4", "old.srt")
    for folder, files in (("videos", names), ("", ("late.webm", "clip.mkv"))):
        (tmp_path / folder).mkdir(exist_ok=True)
        for name in files:
            (tmp_path / folder / name).write_bytes(b"")
    (tmp_path / "videos" / "003").mkdir()
    return [tmp_path / "videos", tmp_path]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("clip", "videos/clip.mp4"),  # not clip.a.mp4, which sorts before it
        ("clip.a", "videos/clip.a.mp4"),
        ("001", "videos/001.mp4"),  # not 001.info.json
        ("001.mp4", "videos/001.mp4"),
        ("two.MP4", "videos/two.MP4"),
        ("take [1]", "videos/take [1].mp4"),
        ("late", "late.webm"),
        ("../late", "late.webm"),
        ("clip.mkv", "clip.mkv"),
        ("old", "videos/old"),  # subtitles are no film
        ("t*o", "videos/t*o"),
        ("003", "videos/003"),
        ("gone.mp4", "videos/gone.mp4"),
    ],
)
def test_a_film_is_the_file_of_its_name_or_the_one_video_of_that_stem(folders: list[Path], name: str, found: str):
    assert find_film(folders, name).resolve() == (folders[1] / found).resolve()


def test_a_name_that_several_videos_have_is_refused_with_all_of_them(folders: list[Path]):
    with pytest.raises(ConfigError, match=r"the film 'two' may be any of two\.MP4, two\.mkv; keep one"):
        find_film(folders, "two")


def test_what_is_no_film_gets_an_address_that_the_runner_fails_at(folders: list[Path]):
    for name in ("gone", "003"):
        assert film_refs(find_film(folders, name), film_sampling(4, 1.0)) == film_refs(
            folders[0] / name, film_sampling(4, 1.0)
        )


def test_frames_come_at_a_rate_or_spread_over_the_film():
    assert (film_sampling(8, 0.5).mode, film_sampling(8, 0.5).fps, film_sampling(8, 0.5).frames) == ("fps", 0.5, 8)
    assert (film_sampling(8, None).mode, film_sampling(8, None).frames) == ("uniform", 8)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"{", "films.json: not a JSON file"),
        (b"\xff", "films.json: not a JSON file"),
        (b'{"a": 1}', "films.json: must hold a list"),
    ],
)
def test_a_file_that_is_no_list_is_refused_by_name(tmp_path: Path, text: bytes, words: str):
    path = tmp_path / "films.json"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=words):
        read_json_list(path)
    path.write_text("[1]")
    assert read_json_list(path) == read_json(path) == [1]


def test_lines_are_numbered_as_an_editor_numbers_them(tmp_path: Path):
    path = tmp_path / "lines.jsonl"
    path.write_text('\n"a\u2028b"\r\n\n3', encoding="utf-8")
    assert read_json_lines(path) == [(2, "a\u2028b"), (4, 3)]
    path.write_text('1\n\n{"a": 1\n')
    with pytest.raises(ConfigError, match=r"lines\.jsonl, line 3: not JSON"):
        read_json_lines(path)
    path.write_bytes(b"1\n\xff\n")
    with pytest.raises(ConfigError, match=r"lines\.jsonl: not UTF-8 text"):
        read_json_lines(path)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ([1], r"line 1: must be an object with name, parts, all, not \[1\]"),
        ({"name": "a", "all": []}, "line 1: lacks 'parts'; it must have name, parts, all"),
        ({"name": 3, "parts": [], "all": []}, "line 1: 'name' is '3'; it must be text"),
        ({"name": "a", "parts": "abc", "all": []}, "line 1: 'parts' is 'abc'; it must be a list of texts"),
        ({"name": "a", "parts": ["b", 1], "all": []}, "'parts' is .* it must be a list of texts"),
        ({"name": "a", "parts": [], "all": {}}, "'all' is '{}'; it must be a list"),
        ({"name": "a", "parts": ["b"], "all": [1], "more": 0}, ""),
    ],
)
def test_an_entry_has_its_fields_and_each_is_of_its_kind(entry: object, words: str):
    fields = {"name": str, "parts": list[str], "all": list}
    if not words:
        check_fields(entry, "line 1", fields)
        return
    with pytest.raises(ConfigError, match=words):
        check_fields(entry, "line 1", fields)
