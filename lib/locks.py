"""One process at a time writes to a folder."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path

PATIENCE = 5  # seconds: what was told to stop needs a moment


class Locked(ValueError):
    """A folder that another process is writing to."""


class Lock:
    """A file that one process holds until it lets go, or ends, however it ends; who holds it stands in the file.

    Raises Locked, with the holder, where it is still held after `patience` seconds (default: PATIENCE).
    """

    def __init__(self, path: Path, patience: float | None = None) -> None:
        self.path, until = path, time.monotonic() + (PATIENCE if patience is None else patience)
        path.parent.mkdir(parents=True, exist_ok=True)
        while not self._take():
            if time.monotonic() > until:
                holder = path.read_text(encoding="utf-8") if path.exists() else "another process"
                raise Locked(f"{path.parent} is being written to by {holder}: wait for it, or stop it")
            time.sleep(0.05)

    def _take(self) -> bool:
        self.file = self.path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self.path.stat().st_ino != os.fstat(self.file.fileno()).st_ino:
                raise FileNotFoundError  # its holder has taken it away between the two lines above
        except (BlockingIOError, FileNotFoundError):
            self.file.close()
            return False
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self.file.flush()
        return True

    def release(self) -> None:
        """Let go, and leave no file behind."""
        self.path.unlink(missing_ok=True)
        self.file.close()

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
