"""A block: a few calls in a row, timed one by one, after which the process is at rest."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

Block: TypeAlias = Callable[[int], Sequence[float]]
"""Does this many calls in a row and gives the wall time of each, in milliseconds."""


class CandidateFailed(Exception):
    """A candidate cannot go on: its message says why. It is left out, the others go on."""


def time_block(run: Callable[[], Any], calls: int) -> list[float]:
    """Do ``calls`` calls in a row after one that does not count, wait for the threads to rest, and give the times.

    Returns:
        The wall time of each call, in milliseconds.
    """
    run()
    times = []
    for _ in range(calls):
        began = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - began))
    wait_until_quiet()
    return times


def wait_until_quiet(most_s: float = 0.3) -> None:
    """Wait until the threads of this process rest, or ``most_s`` have passed.

    Threads that wait busily use processor time though nobody called them; when the process uses none, they sleep.
    """
    end = time.perf_counter() + most_s
    while time.perf_counter() < end:
        began, used = time.perf_counter(), time.process_time()
        time.sleep(0.002)
        if time.process_time() - used < 0.1 * (time.perf_counter() - began):
            return
