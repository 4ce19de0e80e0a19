"""Where a tar ends. `tarfile` stops in silence at a cut between two members, at a damaged header, and where another tar
was put behind the first."""

from __future__ import annotations

import tarfile
from typing import BinaryIO

TAR_END = 1024
"""Bytes of zeros behind the last member of a whole tar, at least."""


def find_end_fault(tar: tarfile.TarFile) -> str | None:
    """What is wrong where `tar` ends, and at which byte; None where it is whole. Reads the headers that are left."""
    file: BinaryIO = tar.fileobj  # type: ignore[assignment]
    damaged = False
    try:
        for _ in tar:
            pass
    except tarfile.TarError:
        damaged = True
    end = file.seek(min(tar.offset, file.seek(0, 2)))
    found = file.read(TAR_END)
    if len(found) < TAR_END:
        return f"is cut short at byte {end}"
    if damaged or any(found):
        return f"has a damaged header at byte {end}"
    behind = end + TAR_END
    while found := file.read(1 << 20):
        if left := found.lstrip(bytes(1)):
            return f"goes on behind its end, at byte {behind + len(found) - len(left)}"
        behind += len(found)
    return None
