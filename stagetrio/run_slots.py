"""At most so many threads run at once, and who waits to run gets its turn in order.

Under the GIL only one thread runs Python code at a time, but all that *could* run stand in the way of the event loop:
when it wakes, it is one among all of them, and each that is chosen before it keeps the interpreter for a switch
interval (5 ms). Sixteen threads that compute make a sleeper late by half a second, one thread by 5 ms; and sixteen do
no more work than one. So a pool for computation lets one of its threads run, whatever their number.

The slots are handed over, not released: who leaves gives its slot to the thread that has waited longest, and it is
free only when nobody waits. A thread that waits is asleep on a lock of its own, so it is not in the loop's way either.
"""

from __future__ import annotations

import threading
from collections import deque


class RunSlots:
    """Slots for running threads, served first come, first served; for any number of threads, without Trio.

    Args:
        slots: how many may run at once, an int ≥ 1.
    """

    def __init__(self, slots: int) -> None:
        if slots < 1:
            raise ValueError(f"slots must be 1 or more, not {slots!r}")
        self._free = slots
        self._line: deque[threading.Lock] = deque()  # each locked; unlocking it hands a slot to its thread
        self._lock = threading.Lock()

    def enter(self) -> None:
        """Take a slot; wait for one."""
        with self._lock:
            if self._free:
                self._free -= 1
                return
            turn = threading.Lock()
            turn.acquire()
            self._line.append(turn)
        turn.acquire()

    def leave(self) -> None:
        """Give the slot to whoever has waited longest."""
        with self._lock:
            if self._line:
                self._line.popleft().release()
            else:
                self._free += 1

    def give_way(self) -> None:
        """Let those who wait run first, then take the next slot; nothing happens while nobody waits."""
        if self._line:
            self.leave()
            self.enter()

    @property
    def waiting(self) -> int:
        """Threads that wait for a slot."""
        return len(self._line)
