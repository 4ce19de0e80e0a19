"""What is kept on this machine between runs, and the local copies of shards that lie elsewhere.

A shard named by a URL (`s3://`, `gs://`, `https://`, whatever fsspec knows) is copied whole before it is first read,
and its index before that. So is what a `pipe:` command writes, where pipes are allowed. Ranks of one machine share the
copies. A copy is taken for what its source holds as long as it lies there. Where copies must make room for others, none
is removed that any process holds.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import time
import weakref
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
from filelock import FileLock

from longvila.errors import ConfigError, DataError

PIPE = "pipe:"
TRIES = 5
PATIENCE = 1.0
"""Seconds before the second try; twice as many before each one after."""
log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where what can be made again is kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longvila"


def is_remote(name: str) -> bool:
    return "://" in name or name.startswith(PIPE)


class ShardCache:
    """Local copies of remote files. A file is known by its place, where its copy lies or will lie.

    Who holds a copy shares a lock on a file beside it, which the one who would remove it must have alone: so it stays,
    whichever process or other `ShardCache` makes room. A lock goes with its process, and with the cache that took it.
    """

    def __init__(self, folder: Path | None = None, limit: float | None = None, allow_pipes: bool = False) -> None:
        """
        Args:
            folder: where copies lie; by default below `cache_folder()`.
            limit: bytes of copies, past which those used longest ago are removed, of any run that shares the folder.
                What is held is not removed, and may come to more.
            allow_pipes: commands may be run; they come from a configuration, never from a shard.
        """
        self._folder = folder or cache_folder() / "shards"
        self._limit, self._allow_pipes = limit, allow_pipes
        self._sources: dict[Path, str] = {}
        self._held: dict[Path, int] = {}
        """The open lock of each copy that is held."""
        weakref.finalize(self, _close, self._held)
        self._ahead = ThreadPoolExecutor(2, thread_name_prefix="shards")

    def place(self, source: str) -> Path:
        """Where the copy of a URL, or of a command's output, lies or will lie.

        Raises:
            ConfigError: a command, and commands are not allowed.
        """
        if source.startswith(PIPE):
            if not self._allow_pipes:
                raise ConfigError(f"'{source}' would run a command; allow that with data.allow_pipes=true")
            path = self._folder / _digest(source) / "shard.tar"
        else:
            parent, _, name = source.rpartition("/")
            path = self._folder / _digest(parent) / name
        self._sources[path] = source
        return path

    def beside(self, path: Path, other: Path) -> None:
        """Makes `other` known as the file of that name beside the remote file at `path`."""
        if (source := self._sources.get(path)) and not source.startswith(PIPE):
            self._sources[other] = source.rpartition("/")[0] + "/" + other.name

    def hold(self, paths: Iterable[Path]) -> None:
        """Keeps the copies at these places, there or yet to come, until `release`. Nothing happens for local files.

        Raises:
            DataError: their folder cannot be written or has no locks, or too many files are open.
        """
        for path in paths:
            if path in self._sources and path not in self._held:
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    self._held[path] = _lock(path, fcntl.LOCK_SH)
                except OSError as error:
                    raise DataError(
                        f"{path}: cannot be locked against removal ({error}); data.cache must be a folder on a disk "
                        "with file locks, and each shard in use takes one open file (`ulimit -n`)"
                    ) from error

    def release(self, paths: Iterable[Path]) -> None:
        """Lets these copies be removed, as far as this cache is concerned."""
        for path in paths:
            if path in self._held:
                os.close(self._held.pop(path))

    def ensure(self, path: Path) -> None:
        """Copies the file whose place `path` is, unless its copy is there. Nothing happens for local files.

        A shard is held before, or it may be gone again afterwards; other files are not removed.

        Raises:
            OSError: it cannot be had, after TRIES tries; FileNotFoundError at once.
        """
        source = self._sources.get(path)
        if source is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if path.exists():
                os.utime(path)
                return
            self._copy(source, path)
        if self._limit is not None:
            self._make_room(self._limit)

    def begin(self, paths: Iterable[Path]) -> None:
        """Copies these in the background, see `ensure`; what fails is tried again when it is needed."""
        for path in paths:
            if path in self._sources and not path.exists():
                self._ahead.submit(self.ensure, path)

    def _copy(self, source: str, path: Path) -> None:
        partial = path.with_name(f"{path.name}.partial")
        for number in range(TRIES):
            try:
                if source.startswith(PIPE):
                    _run(source.removeprefix(PIPE), partial)
                else:
                    _download(source, partial)
                os.replace(partial, path)
                return
            except (FileNotFoundError, PermissionError, ImportError):
                raise
            except Exception as error:  # every kind of storage has errors of its own
                if number == TRIES - 1:
                    raise OSError(f"{source} cannot be had after {TRIES} tries ({error})") from error
                log.warning("%s: %s; trying again", source, error)
                time.sleep(PATIENCE * 2**number)

    def _make_room(self, limit: float) -> None:
        copies = []
        for path in self._folder.glob("*/*.tar"):
            try:
                status = path.stat()
            except FileNotFoundError:  # another rank made room
                continue
            copies.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in copies)
        for _, size, path in sorted(copies):
            if total > limit and _remove(path):
                total -= size
        if total > limit:
            log.warning("shards in use take %.1f GiB, more than data.cache_gib allows", total / 2**30)


def _lock(path: Path, kind: int) -> int:
    """An open file that locks the copy at `path` until it is closed. Raises OSError."""
    lock = os.open(f"{path}.use", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, kind)
    except OSError:
        os.close(lock)
        raise
    return lock


def _close(held: dict[Path, int]) -> None:
    for lock in held.values():
        os.close(lock)


def _remove(path: Path) -> bool:
    """Removes a copy, unless someone holds it."""
    try:
        lock = _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    path.unlink(missing_ok=True)
    os.close(lock)
    return True


def _download(source: str, path: Path) -> None:
    filesystem, name = fsspec.url_to_fs(source)
    with filesystem.open(name, "rb") as remote, path.open("wb") as local:
        shutil.copyfileobj(remote, local, 1 << 20)
    expected = filesystem.info(name).get("size")
    if expected is not None and path.stat().st_size != expected:
        raise OSError(f"{path.stat().st_size} of {expected} bytes came")


def _run(command: str, path: Path) -> None:
    with path.open("wb") as local:
        done = subprocess.run(command, shell=True, stdout=local, stderr=subprocess.PIPE, check=False)
    if done.returncode:
        raise OSError(f"exit code {done.returncode}: {done.stderr.decode(errors='replace').strip()[-200:]}")


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:16]
