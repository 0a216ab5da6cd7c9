"""Reading ordinary files only, and writing a file so that it is the old one or the new one, whole, whatever happens.

The new content goes to a file beside the target (the same file system), is flushed to the disk, and takes the target's
name in one step. A program that is killed on the way leaves the half-written file behind under a name that the next
write to the same target recognizes and removes.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from memfit.errors import MemfitError

_ADVICE = {
    errno.ENOENT: "the folder does not exist: create it",
    errno.ENOTDIR: "the folder is not a folder: choose another",
    errno.EISDIR: "a folder has that name: choose another name",
    errno.ENOSPC: "the disk is full: free some space, or choose a folder on another disk",
    errno.EDQUOT: "the disk quota is used up: free some space, or choose a folder on another disk",
    errno.EFBIG: "the file grows larger than is allowed here: raise the limit, or choose a folder on another disk",
    errno.EACCES: "the folder may not be written to: choose another, or change its permissions",
    errno.EPERM: "the folder may not be written to: choose another, or change its permissions",
    errno.EROFS: "the disk is read-only: choose a folder on another disk",
    errno.ENAMETOOLONG: "the name is too long: choose a shorter one",
}


def read_file(path: str | os.PathLike[str], what: str, error: type[MemfitError]) -> bytes:
    """The content of an ordinary file.

    Args:
        path: the file.
        what: what it should be, for messages: ``"image"``.
        error: the error to raise.

    Raises:
        MemfitError: ``error``, where it is missing, is no ordinary file, or cannot be read.
    """
    check_ordinary(path, what, error)
    try:
        return Path(path).read_bytes()
    except OSError as problem:
        raise error(f"{path}: the {what} cannot be read: {problem.strerror or problem}.") from problem


def check_ordinary(path: str | os.PathLike[str], what: str, error: type[MemfitError]) -> None:
    """Refuse a file that is missing, and a folder, a pipe, which may never come, and a device, which may never end.

    Raises:
        MemfitError: ``error``, as :func:`read_file` would.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError) as problem:  # ValueError: a name with a null character
        raise error(f"{path}: there is no such {what}.") from problem
    except OSError as problem:
        raise error(f"{path}: the {what} cannot be read: {problem.strerror or problem}.") from problem
    if not stat.S_ISREG(mode):
        found = "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
        article = "an" if what[0] in "aeiouAEIOU" else "a"
        raise error(f"{path}: this is {found}, not {article} {what}: give an ordinary file.")


@contextmanager
def atomic_write(path: str | os.PathLike[str], what: str, error: type[MemfitError]) -> Iterator[BinaryIO]:
    """Open a file for writing that takes its name only when the block has ended without an exception.

    Args:
        path: the target. When it is a link, the file that it points to is replaced. Its folder must exist.
        what: what is written, for messages: ``"checkpoint"``.
        error: the error to raise.

    Yields:
        A seekable binary file.

    Raises:
        MemfitError: ``error``, when the file cannot be written: a missing folder, no permission, a full disk. An
            earlier file of that name is then intact, and nothing is left beside it.

    Example:
        >>> with atomic_write("report.json", "report", DataError) as file:
        ...     file.write(text.encode())
    """
    target = Path(os.path.realpath(path))
    temporary = _temporary(target)
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        remove_leftovers(target)
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except OSError as problem:
        raise error(f"{path}: the {what} cannot be written: {_reason(problem)}.") from problem
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str], what: str, error: type[MemfitError]) -> None:
    """Find out before a long computation whether its result could be written to ``path``; changes nothing there.

    Raises:
        MemfitError: ``error``, as :func:`atomic_write` would.
    """
    target = Path(os.path.realpath(path))
    temporary = _temporary(target)
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        open(temporary, "xb").close()
    except OSError as problem:
        raise error(f"{path}: the {what} cannot be written: {_reason(problem)}.") from problem
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_leftovers(target: Path) -> None:
    """Remove what programs that were killed while they wrote ``target`` have left beside it."""
    leftover = re.compile(re.escape(f".{target.name}.") + r"[0-9a-f]{8}\.partial")
    with os.scandir(target.parent) as entries:
        names = [entry.name for entry in entries if leftover.fullmatch(entry.name)]
    for name in names:
        target.with_name(name).unlink(missing_ok=True)


def _temporary(target: Path) -> Path:
    # Not from `random`: writing a file must not change the random numbers of the training run that writes it.
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")


def _sync_folder(folder: Path) -> None:
    """Make the new name survive a power failure; some systems and file systems cannot do that for a folder."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as problem:
        if problem.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)


def _reason(problem: OSError) -> str:
    return _ADVICE.get(problem.errno or 0, problem.strerror or str(problem))
