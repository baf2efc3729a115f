"""The values of a remote stream, between the connection and whoever iterates.

Theory of operation. The worker may send as many values as it has credit for. It starts with ``window`` and is granted
more as values are taken out: half a window at a time, so that a steady consumer costs one credit frame per
``window / 2`` values and the worker never runs dry. Values held + values taken since the last grant + credit
outstanding = ``window``: so no more than ``window`` values are ever held here, however slow the consumer, and the
generator over there is paused in its ``yield``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import trio
from msgspec import Raw

from stagetrio.framing import ProtocolError


class Values:
    """The buffer of one stream.

    Args:
        window: The most values held; ≥ 1.
        grant: Tells the worker how many more may come, given the id of the stream.
    """

    def __init__(self, window: int, grant: Callable[[int, int], object]) -> None:
        self._window = window
        self._grant = grant
        self._held: deque[Raw] = deque()
        self._taken = 0  # since the last grant
        self._ended = self._closed = False
        self._error: Exception | None = None
        self._waiting = trio.lowlevel.ParkingLot()
        self.id = 0

    def add(self, value: Raw) -> None:
        """Take a value from the connection.

        Raises:
            ProtocolError: The worker had no credit for it.
        """
        if len(self._held) + self._taken >= self._window:
            raise ProtocolError(f"more values than credit for id {self.id}")
        self._held.append(value)
        self._waiting.unpark()

    def end(self, error: Exception | None) -> None:
        """Take the end: what is held is still given out, then it ends, with ``error`` if there is one."""
        self._ended, self._error = True, error
        self._waiting.unpark_all()

    def close(self) -> None:
        """Give out nothing any more: whoever waits for a value, or will, is told so."""
        self._closed = True
        self._held.clear()
        self._waiting.unpark_all()

    async def take(self) -> Raw:
        """Return the next value.

        Raises:
            StopAsyncIteration: There are no more.
            trio.ClosedResourceError: It has been closed.
            RemoteError, Overloaded, WorkerLost: So it ended; for whoever asks again there are no more.

        Checkpoints: always; a cancellation leaves the value for the next.
        """
        await trio.lowlevel.checkpoint()
        while not self._held:
            if self._closed:
                raise trio.ClosedResourceError("the block of this stream has been left")
            if self._ended:
                error, self._error = self._error, None
                raise error or StopAsyncIteration
            await self._waiting.park()
        self._taken += 1
        if self._taken * 2 >= self._window and not self._ended:
            self._grant(self.id, self._taken)
            self._taken = 0
        return self._held.popleft()
