"""Atomic writes: even after a crash or a power cut, a file or directory is either as before or new and whole."""

import contextlib
import errno
import os
import shutil
import tempfile
from pathlib import Path

from filelock import FileLock, Timeout

from support.settings import UserError


def write_atomically(path, content):
    """Write text or bytes to a file. At every moment the file holds its old content or all of the new."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        fsync(part)
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def atomic_replace_dir(new, old):
    """Replace the directory `old` by the finished directory `new`. At every moment, even in a power cut, one of the two
    exists and is whole; latest_intact_dir() finds it."""
    for path in (*new.iterdir(), new):
        fsync(path)
    aside = old.with_name(old.name + ".replaced")
    if old.exists():  # if not, a crash left it at `aside`, where it stays until the new one is in place
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(old, aside)
    os.replace(new, old)
    fsync(old.parent)
    shutil.rmtree(aside, ignore_errors=True)


def latest_intact_dir(path):
    """Return `path`, or the path where a crash during atomic_replace_dir() left the old directory."""
    aside = path.with_name(path.name + ".replaced")
    return path if path.exists() or not aside.exists() else aside


@contextlib.contextmanager
def lock_folder(path):
    """Lock a folder, which need not exist, for this process. The lock ends with the `with` block, or with the process
    if it crashes. Raises UserError if another process holds the lock."""
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    lock_file = path.with_name(f".{path.name}.lock")
    if not os.access(path.parent, os.W_OK):  # as of a folder that is mounted into a container
        lock_file = Path(tempfile.gettempdir(), f"{str(path).replace(os.sep, '-')}.lock")
    try:
        with FileLock(lock_file, timeout=0):
            try:
                yield
            finally:
                with contextlib.suppress(OSError):  # Windows cannot delete an open file
                    os.unlink(lock_file)
    except Timeout:
        raise UserError(f"{path}: another process is writing to it: wait, stop it, or name another folder") from None


def fsync(path):
    """Wait until a file, or a directory's list of files, is on the disk."""
    is_dir = os.path.isdir(path)
    try:
        handle = os.open(path, os.O_RDONLY if is_dir else os.O_RDWR)  # Windows syncs only files opened for writing
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as e:
        # Windows cannot open directories and some filesystems cannot sync them; their entries are written all the same
        if not is_dir or e.errno not in (errno.EACCES, errno.EINVAL, errno.ENOTSUP):
            raise
