"""support/files.py: files and directories are whole or unchanged, on every filesystem."""

import contextlib
import errno
import fcntl
import os
import subprocess
import sys

import pytest
from conftest import HOME

from support.files import atomic_replace_dir, fsync, lock_folder, write_atomically
from support.settings import UserError


def test_files_are_synced_on_windows_too(tmp_path, monkeypatch):
    """There fsync needs a handle opened for writing, and directories cannot be opened."""
    fsync, open_ = os.fsync, os.open

    def strict_open(path, flags, *args):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied")
        return open_(path, flags, *args)

    def strict_fsync(handle):
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        fsync(handle)

    monkeypatch.setattr(os, "open", strict_open)
    monkeypatch.setattr(os, "fsync", strict_fsync)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "file").write_text("text")
    atomic_replace_dir(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old" / "file").read_text() == "text"


@pytest.mark.parametrize("number, is_error", [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_a_filesystem_that_cannot_sync_directories_loses_no_save(tmp_path, monkeypatch, number, is_error):
    def failing_fsync(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}") or number == errno.EIO:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", failing_fsync)
    with pytest.raises(OSError) if is_error else contextlib.nullcontext():
        fsync(tmp_path)


def test_a_write_that_fails_leaves_the_old_content_and_nothing_else(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    write_atomically(tmp_path / "log", "old")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError):
        write_atomically(tmp_path / "log", b"new")
    assert (tmp_path / "log").read_text() == "old" and os.listdir(tmp_path) == ["log"]


def test_a_folder_is_locked_while_a_process_lives(tmp_path, monkeypatch):
    """Two runs with one out_dir once moved each other's folder aside, and their logs mixed."""
    code = "import time; from pathlib import Path; from support.files import lock_folder; "
    code += (
        f"x = lock_folder(Path({str(tmp_path / 'run')!r})); x.__enter__(); print('locked', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=HOME, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"locked\n"
    with pytest.raises(UserError, match="another process is writing to it"), lock_folder(tmp_path / "run"):
        pass
    holder.kill()  # a crash frees the folder
    holder.wait()
    for is_writable in (True, False):
        monkeypatch.setattr(os, "access", lambda path, mode, is_writable=is_writable: is_writable)
        with lock_folder(tmp_path / "run"):
            assert [path.name for path in tmp_path.iterdir()] == [".run.lock"] * is_writable
    assert not list(tmp_path.iterdir())
