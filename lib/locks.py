"""One process at a time writes to a folder."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from lib.errors import Refusal

PATIENCE = 5  # seconds: what was told to stop needs a moment


class Locked(Refusal):
    """A folder that another process is writing to, or that cannot be kept for one."""


class Lock:
    """A file that one process holds until it lets go, or ends, however it ends; who holds it stands in the file.

    Raises Locked, with the holder, where it is still held after `patience` seconds (default: PATIENCE), and where the
    file system has no locks.
    """

    def __init__(self, path: Path, patience: float | None = None) -> None:
        self.path, until = path, time.monotonic() + (PATIENCE if patience is None else patience)
        path.parent.mkdir(parents=True, exist_ok=True)
        while not self._take():
            if time.monotonic() > until:
                raise Locked(f"{path.parent} is being written to by {self._holder()}: wait for it, or stop it")
            time.sleep(0.05)

    def _take(self) -> bool:
        self.file = self.path.open("ab", buffering=0)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self.path.stat().st_ino != os.fstat(self.file.fileno()).st_ino:
                raise FileNotFoundError  # its holder has taken it away between the two lines above
        except (BlockingIOError, FileNotFoundError):
            self.file.close()
            return False
        except OSError as error:
            self.file.close()
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
                raise
            why = f"its file system has no locks ({error.strerror}), and two could write there at once"
            raise Locked(f"{self.path.parent} cannot be written to: {why}; use one on another file system") from None
        with suppress(OSError):  # on a full disk nobody's name stands there
            self.file.truncate(0)
            self.file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        return True

    def _holder(self) -> str:
        with suppress(OSError):
            return self.path.read_text(encoding="utf-8", errors="replace").strip() or "another process"
        return "another process"

    def release(self) -> None:
        """Let go, and leave no file behind."""
        self.path.unlink(missing_ok=True)
        self.file.close()

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
