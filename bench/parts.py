"""A measurement in parts: what is known is on disk after each of them, and none runs past its time.

1. The parts run in order; each adds to the result, which is then written to `<name>.part.json`.
2. A part that fails is named in `failed`, with its error, and the others go on - but for the first, which makes what
   they need. When the time has come, the part that runs is broken off and named in `left_out`, with those behind it.
3. Only a result of which nothing is missing becomes `<name>.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COMPLETE, FAILED, OUT_OF_TIME = 0, 1, 3  # exit statuses


class OutOfTime(BaseException):
    """The time has come; no part may take it for an error of its own."""


def add_options(parser: argparse.ArgumentParser, folder: Path) -> None:
    """`--out` and `--until`."""
    parser.add_argument("--out", type=Path, default=folder, help="folder of the result")
    parser.add_argument("--until", type=float, default=float("inf"), help="seconds since 1970 at which to stop")


def run(parts: Mapping[str, Callable[[], None]], result: dict[str, Any], path: Path, until: float) -> int:
    """Run the parts, each of which adds to `result`, until the time `until`; returns the exit status."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished, todo, failed = path.with_suffix(".part.json"), list(parts), {}
    try:
        with stopped(until):
            for name, part in parts.items():
                begun = time.perf_counter()
                try:
                    part()
                except Exception as error:
                    print(traceback.format_exc(), flush=True)
                    failed[name] = f"{type(error).__name__}: {error}"
                todo.remove(name)
                print(
                    f"{name}: {'failed' if name in failed else 'done'}, {time.perf_counter() - begun:.1f} s", flush=True
                )
                write(unfinished, result | ({"failed": failed} if failed else {}))
                if failed and len(todo) == len(parts) - 1:
                    break
    except OutOfTime:
        print(f"no time is left for: {', '.join(todo)}", flush=True)
    if failed or todo:
        write(unfinished, result | {"failed": failed, "left_out": todo})
        print(f"not complete: {unfinished.name}", flush=True)
        return FAILED if failed else OUT_OF_TIME
    unfinished.replace(path)
    print(f"{json.dumps(result, indent=1)}\n{path.name}", flush=True)
    return COMPLETE


@contextmanager
def stopped(until: float) -> Iterator[None]:
    """Raise OutOfTime inside when the time has come."""
    if until == float("inf"):
        yield
        return

    def stop(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, max(1e-3, until - time.time()))
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Write the result whole or not at all."""
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)
