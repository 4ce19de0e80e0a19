"""`longvila.media.sampling`: which moments are taken."""

from __future__ import annotations

import pytest

from longvila.config import FrameSampling
from longvila.media import VideoInfo, sample_timestamps


def film(duration: float, fps: float = 4.0) -> VideoInfo:
    return VideoInfo(duration, fps, max(1, round(duration * fps)), 96, 64, "h264", 0)


def test_fps_mode_takes_one_frame_each_step_from_the_start():
    assert sample_timestamps(film(5.0), FrameSampling("fps", frames=99, fps=1.0)) == (0.0, 1.0, 2.0, 3.0, 4.0)
    assert sample_timestamps(film(5.5), FrameSampling("fps", frames=99, fps=0.5)) == (0.0, 2.0, 4.0)


def test_a_duration_rounded_up_adds_no_frame():
    assert len(sample_timestamps(film(10.002), FrameSampling("fps", frames=99, fps=1.0))) == 10


def test_past_the_cap_the_frames_are_spread_over_the_whole_video():
    assert sample_timestamps(film(100.0), FrameSampling("fps", frames=4, fps=1.0)) == (12.5, 37.5, 62.5, 87.5)


def test_uniform_mode_takes_the_middle_of_equal_parts():
    assert sample_timestamps(film(8.0), FrameSampling("uniform", frames=4)) == (1.0, 3.0, 5.0, 7.0)


@pytest.mark.parametrize("sampling", [FrameSampling("uniform", 64), FrameSampling("fps", 64, 30.0)])
def test_never_more_than_the_video_has_frames(sampling):
    assert len(sample_timestamps(film(1.0), sampling)) == 4
    assert len(sample_timestamps(film(0.25), sampling)) == 1


@pytest.mark.parametrize("duration", [0.05, 0.3, 1.0, 7.77, 3600.0])
@pytest.mark.parametrize(
    "sampling", [FrameSampling("uniform", 7), FrameSampling("fps", 7, 0.3), FrameSampling("fps", 9)]
)
def test_times_rise_and_lie_inside_the_video(duration, sampling):
    times = sample_timestamps(film(duration), sampling)
    assert 1 <= len(times) <= sampling.frames
    assert all(0 <= time < duration for time in times)
    assert list(times) == sorted(set(times))


def test_a_still_image_is_one_frame():
    assert sample_timestamps(None, FrameSampling("uniform", 8)) == (0.0,)
