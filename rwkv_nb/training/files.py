"""Files that are whole or not there: written under a temporary name, renamed when on the disk, checked when read.

It is: torch.save and torch.load for tensors and plain values, with errors that name the file. It is not: a format; what
a file holds is the business of checkpoint.py (weights) and trainer_state.py (everything else).

A write takes five steps: open the temporary file, write, fsync it, rename it, fsync the folder. Killed before the
rename, the earlier file of that name is as it was, and `.NAME.PID.tmp` is left over for `remove_orphans`; killed after
it, the new file is complete.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any, BinaryIO

import torch

from rwkv_nb.model.reading import CODE, DAMAGE, read_torch_file

_TEMPORARY = re.compile(r"(?:\.rwkv-.+\.(?:pth|state)|vocab\.json)\.(\d+)\.tmp")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk full, quota used up, file larger than allowed
_ORPHAN_AFTER = 24 * 3600.0  # seconds; a process of another machine cannot be asked whether it lives


class CheckpointError(ValueError):
    """A checkpoint or trainer state that cannot be read or used; the message names the file and the remedy."""


class _Watched:
    """A file that remembers why a write failed: torch's zip writer often reports something else."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.error = file, None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self.file.flush()


def write_tensors(content: Any, path: str | os.PathLike) -> Path:
    """Write `content` (as for torch.save) to `path`, whole or not at all; its folder is made if need be.

    Raises OSError as the system gives it; a full disk with the file, the room that it needs and the room there is.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    watched = None
    try:
        with open(temporary, "wb") as file:
            watched = _Watched(file)
            torch.save(content, watched)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        cause = (watched.error if watched is not None else None) or error
        temporary.unlink(missing_ok=True)
        if isinstance(cause, OSError) and cause.errno in _NO_ROOM:
            raise OSError(cause.errno, _no_room(content, path, cause)) from error
        if cause is not error:
            raise cause from error
        raise
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def read_tensors(path: str | os.PathLike) -> Any:
    """What a file holds, tensors on the CPU; nothing that it may contain is run.

    Raises FileNotFoundError; PermissionError and the like as they come; CheckpointError for a file that is damaged or
    that holds code (see rwkv_nb.model.reading).
    """
    path = Path(path)
    open(path, "rb").close()  # outside of the try below: a file that may not be opened is not damaged
    try:
        return read_torch_file(path)
    except CODE as error:
        raise CheckpointError(
            f"{path}: refused, because it is damaged or contains more than tensors, possibly code that would run on "
            f"loading; download or save it again, from a source that you trust ({_first_line(error)})"
        ) from error
    except DAMAGE as error:
        raise CheckpointError(
            f"{path}: damaged or cut short ({path.stat().st_size} bytes); use an earlier checkpoint or download it "
            f"again ({_first_line(error)})"
        ) from error


def remove_orphans(folder: str | os.PathLike) -> list[str]:
    """Delete the temporary files of runs that were killed while they wrote; returns their names.

    The process in the name must be gone, or be this one, which is not writing now; or the file is a day old.
    """
    removed = []
    for path in sorted(Path(folder).glob("*.tmp")):
        match = _TEMPORARY.fullmatch(path.name)
        with contextlib.suppress(FileNotFoundError):
            if match and (not _alive(int(match[1])) or time.time() - path.stat().st_mtime > _ORPHAN_AFTER):
                path.unlink()
                removed.append(path.name)
    return removed


def size_of(content: Any) -> int:
    """Bytes of all tensors in nested dictionaries, lists and tuples: what a file of them needs, give or take names."""
    if isinstance(content, torch.Tensor):
        return content.untyped_storage().nbytes()
    if isinstance(content, dict):
        return sum(map(size_of, content.values()))
    return sum(map(size_of, content)) if isinstance(content, list | tuple) else 0


def _no_room(content: Any, path: Path, cause: OSError) -> str:
    needed, free = size_of(content), shutil.disk_usage(path.parent).free
    return (
        f"{path}: not written, there is no room ({cause.strerror}): it needs about {needed / 1e6:.1f} MB, "
        f"{free / 1e6:.1f} MB are free there; make room and start again, no earlier file has been touched"
    )


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a loss of power, where the system can do that (not on Windows)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have no such thing
            raise
    finally:
        os.close(handle)


def _alive(process: int) -> bool:
    """Whether another process of this number runs on this machine."""
    if process == os.getpid():
        return False
    if os.name != "posix":
        return True  # asking would end it on Windows: the age of the file decides
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:150]}" if lines else type(error).__name__
