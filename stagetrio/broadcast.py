"""One bounded log, read by many, each from where it joined.

Theory of operation. A message to all holders and waiters could be copied into a mailbox for each of them: then every
ticket pays for a mailbox, and a broadcast costs as much as there are listeners. Here a broadcast is one append to one
log of the last `max_messages` values, and a reader is a cursor into it: the number of broadcasts sent when it joined.
Joining costs one integer; a listener that never reads costs nothing. A reader that falls behind the log's tail has
missed the oldest, and knows how many.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any

import trio


class Broadcasts:
    """The log of the last `max_messages` broadcasts.

    Args:
        max_messages: Values kept, ≥ 1; a reader further behind has lost the oldest.
    """

    def __init__(self, max_messages: int) -> None:
        if not max_messages >= 1:
            raise ValueError(f"max_messages must be >= 1, not {max_messages!r}")
        self.sent = 0
        self._log: deque[Any] = deque(maxlen=max_messages)
        self._readers = trio.lowlevel.ParkingLot()

    def send(self, value: object) -> None:
        """Append `value` and wake whoever waits for one."""
        self._log.append(value)
        self.sent += 1
        self._readers.unpark_all()

    def since(self, cursor: int, until: int) -> Iterator[Any]:
        """The values kept of those numbered from `cursor` up to `until`."""
        first = self.sent - len(self._log)
        return islice(self._log, max(0, cursor - first), max(0, until - first))


class Messages:
    """The broadcasts sent since one listener joined, each to be received once.

    ``async for`` and `receive` take them in order and wait for more until the listener has left; iterating and
    ``len`` look at what is there and take nothing.
    """

    __slots__ = ("_broadcasts", "_cursor", "_dropped", "_end")

    def __init__(self, broadcasts: Broadcasts, joined: int) -> None:
        self._broadcasts = broadcasts
        self._cursor = joined
        self._end: int | None = None
        self._dropped = 0

    @property
    def dropped(self) -> int:
        """Messages that fell off the log before they were received."""
        self._catch_up()
        return self._dropped

    def receive_nowait(self) -> Any:
        """Take the oldest message.

        Raises:
            trio.WouldBlock: There is none now.
            trio.EndOfChannel: There is none, and the listener has left, so there will be none.
        """
        self._catch_up()
        for value in self._broadcasts.since(self._cursor, self._until):
            self._cursor += 1
            return value
        if self._end is not None:
            raise trio.EndOfChannel
        raise trio.WouldBlock

    async def receive(self) -> Any:
        """Wait for a message and take it.

        Raises:
            trio.EndOfChannel: The listener has left, and every message sent before that was taken.

        Checkpoints: always. A cancelled call has taken nothing.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            try:
                value = self.receive_nowait()
            except trio.WouldBlock:
                await self._broadcasts._readers.park()
            else:
                await trio.lowlevel.cancel_shielded_checkpoint()
                return value

    def __aiter__(self) -> Messages:
        return self

    async def __anext__(self) -> Any:
        try:
            return await self.receive()
        except trio.EndOfChannel:
            raise StopAsyncIteration from None

    def __iter__(self) -> Iterator[Any]:
        self._catch_up()
        return iter(list(self._broadcasts.since(self._cursor, self._until)))

    def __len__(self) -> int:
        self._catch_up()
        return self._until - self._cursor

    @property
    def _until(self) -> int:
        return self._broadcasts.sent if self._end is None else self._end

    def _catch_up(self) -> None:
        """Move the cursor past what the log has lost."""
        kept_from = min(self._broadcasts.sent - len(self._broadcasts._log), self._until)
        if self._cursor < kept_from:
            self._dropped += kept_from - self._cursor
            self._cursor = kept_from

    def _finish(self, left: int) -> None:
        """The listener left when `left` broadcasts had been sent."""
        if self._end is None:
            self._end = left
            self._broadcasts._readers.unpark_all()
