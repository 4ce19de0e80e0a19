"""`longvila.media.pool`: what a broken decoder may cost. The breakage is real: signals, and a file without an end."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import time

import pytest
import torch

from longvila.errors import MediaError
from longvila.media import WHOLE, Decoder, FileRange, decode_frames, empty_frames
from longvila.media.pool import Processes, _stop

from .video_fixtures import make_image, make_video, read_number


@pytest.fixture(scope="module")
def film():
    return make_video(num_frames=8, fps=1, first_number=7)


def filled(waits, count=1):
    """What is waited for."""
    frames = empty_frames(count, 48)
    waits(frames)
    return frames


def parent_of(process):
    with open(f"/proc/{process}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])


def decoding_processes():
    """The grandchildren of this process: its child, the fork server, made them."""
    processes = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    parents = {}
    for process in processes:
        with contextlib.suppress(OSError):
            parents[process] = parent_of(process)
    return [process for process, parent in parents.items() if parents.get(parent) == os.getpid()]


def test_processes_give_the_frames_that_the_caller_would_get(film, tmp_path):
    path = tmp_path / "shard.tar"
    path.write_bytes(b"before" + film + b"behind")
    decoder = Decoder(2)
    times = (0.0, 3.0, 7.0)
    whole = decode_frames(film, times, 48, "film")
    for media in (film, FileRange(path, 6, len(film))):
        assert torch.equal(filled(decoder.start(media, times, 48, "film"), 3), whole)
    assert read_number(filled(decoder.start(make_image(11), (WHOLE,), 48, "picture"))[0]) == 11


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_not_a_film_is_said_by_name(workers):
    waits = Decoder(workers).start(b"not a film", (0.0,), 48, "talk-7")
    with pytest.raises(MediaError, match="talk-7: cannot be read as a video"):
        filled(waits)


def test_a_process_that_dies_costs_its_one_film(film, tmp_path, caplog):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)  # opening it waits for a writer
    others = set(decoding_processes())
    decoder = Decoder(1)
    early = decoder.start(film, (0.0,), 48, "early")
    dying = decoder.start(FileRange(fifo, 0, 10), (0.0,), 48, "dying")
    late = decoder.start(film, (1.0,), 48, "late")
    assert read_number(filled(early)[0]) == 7
    time.sleep(0.5)
    (process,) = set(decoding_processes()) - others
    os.kill(process, signal.SIGSEGV)
    with pytest.raises(MediaError, match=r"^dying: its decoder died \(SIGSEGV\)$"):
        filled(dying)
    assert "dying: its decoder died" in caplog.text
    assert read_number(filled(late)[0]) == 8


def test_a_film_that_hangs_is_dropped_in_time(film, tmp_path, caplog):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    decoder = Decoder(1, timeout=4.0)
    hanging = decoder.start(FileRange(fifo, 0, 10), (0.0,), 48, "endless")
    good = decoder.start(film, (2.0,), 48, "good")
    with pytest.raises(MediaError, match=r"endless: decoding took longer than 4 s"):
        filled(hanging)
    assert "endless: decoding took longer" in caplog.text
    assert read_number(filled(good)[0]) == 9


def test_processes_end_with_their_decoder(film):
    others = set(decoding_processes())
    decoder = Decoder(2)
    filled(decoder.start(film, (0.0,), 48, "film"))
    assert len(set(decoding_processes()) - others) == 2
    del decoder
    gc.collect()
    deadline = time.monotonic() + 10
    while set(decoding_processes()) - others and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not set(decoding_processes()) - others


def test_processes_end_wherever_the_garbage_collector_finds_them_unused():
    """Also in a thread of the pool, which cannot wait for its own end."""
    before = set(decoding_processes())
    processes = Processes(1, None)
    assert processes.start("name", os.getpid)() in set(decoding_processes()) - before
    pool, outcome = processes._pool, []

    def collect(_: object) -> None:
        try:
            outcome.append(_stop(pool))
        except RuntimeError as error:
            outcome.append(error)

    pool.schedule(os.getpid).add_done_callback(collect)
    deadline = time.monotonic() + 20
    while (not outcome or set(decoding_processes()) - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert outcome == [None]
    assert set(decoding_processes()) <= before
