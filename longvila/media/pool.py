"""Work on media in processes of their own: what crashes or hangs costs one task, and a new process takes its place."""

from __future__ import annotations

import concurrent.futures
import functools
import logging
import multiprocessing
import signal
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from pebble import ProcessExpired, ProcessPool

from longvila.errors import MediaError
from longvila.media.container import Media
from longvila.media.decode import decode_frames, decode_tiles, empty_frames
from longvila.media.tiles import Tile, Views

log = logging.getLogger(__name__)

Decoded = Callable[[torch.Tensor], None]
"""Waits for frames and puts them where it is told, uint8 (F, 3, S, S). Raises MediaError where they cannot be had."""


class Processes:
    """Runs functions in the calling process, or in `workers` others.

    The others are forked from a clean process that knows only this package: no thread, lock, accelerator or open film
    of the caller is in them.
    """

    def __init__(self, workers: int, timeout: float | None) -> None:
        """
        Args:
            workers: processes; with 0, work is done when it is waited for, and nothing guards the caller.
            timeout: seconds after which one task counts as hung.
        """
        self._timeout = timeout
        self._pool: ProcessPool | None = None
        if workers:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__])
            self._pool = ProcessPool(workers, initializer=_prepare, context=context)  # type: ignore[arg-type]
            weakref.finalize(self, _stop, self._pool)

    def start(self, name: str, function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
        """Begins `function(*args)`, on a medium called `name`; what is returned waits for the result.

        That raises what the function raises, and MediaError where its process dies or hangs.
        """
        if self._pool is None:
            return functools.partial(function, *args)
        future = self._pool.schedule(function, args, timeout=self._timeout)
        return functools.partial(self._wait, future, name)

    def _wait(self, future: concurrent.futures.Future, name: str) -> Any:
        try:
            return future.result()
        except ProcessExpired as error:
            cause = signal.Signals(-error.exitcode).name if error.exitcode < 0 else f"exit code {error.exitcode}"
            raise _lost(f"{name}: its decoder died ({cause})") from error
        except concurrent.futures.TimeoutError as error:
            raise _lost(f"{name}: decoding took longer than {self._timeout:g} s") from error


class Decoder:
    """Decodes videos and images in `Processes`."""

    def __init__(self, workers: int = 0, timeout: float | None = None) -> None:
        self._workers = workers
        self._processes = Processes(workers, timeout)

    def start(self, media: Media, views: Views, size: int, name: str) -> Decoded:
        """Begins to decode the frames of a video at given seconds (`decode_frames`), or tiles of an image."""
        if not self._workers:
            return functools.partial(_decode, media, views, size, name)
        waits = self._processes.start(name, _decode_to_array, media, views, size, name)

        def fill(out: torch.Tensor) -> None:
            out.permute(0, 2, 3, 1).numpy()[...] = waits()

        return fill


def _lost(reason: str) -> MediaError:
    log.warning("%s; a new process takes its place", reason)
    return MediaError(reason)


def _decode(media: Media, views: Views, size: int, name: str, out: torch.Tensor) -> None:
    tiles = [view for view in views if isinstance(view, Tile)]
    if tiles:
        decode_tiles(media, tiles, size, name, out)
    else:
        decode_frames(media, [view for view in views if not isinstance(view, Tile)], size, name, out)


def _decode_to_array(media: Media, views: Views, size: int, name: str) -> np.ndarray:
    """uint8 (F, S, S, 3): a tensor would travel as a file handle."""
    out = empty_frames(len(views), size)
    _decode(media, views, size, name, out)
    return out.permute(0, 2, 3, 1).numpy()


def _prepare() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupted run stops its processes itself


def _stop(pool: ProcessPool) -> None:
    pool.stop()
    if threading.current_thread() is threading.main_thread():
        pool.join()
    else:  # the garbage collector runs where it likes: maybe in a thread of the pool, which cannot wait for its own end
        threading.Thread(target=pool.join).start()
