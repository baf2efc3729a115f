"""A fair queue by the two ends of a memory channel, for code that was written for one.

`open_fair_channel` stands where `trio.open_memory_channel` stood. Whatever holds an end goes on as before: it sends and
receives, clones its end for each task, and closes it; what it gets on top is that the producers take turns. Each clone
of the sending end is a flow of its own, so whoever sends most delays the others by one item, and not by its backlog.

The contract is the memory channel's (``tests/test_channel_contract.py`` holds both to it). When the last sending end is
closed, receivers get what is left and then `trio.EndOfChannel`; when the last receiving end is closed, senders get
`trio.BrokenResourceError`; who waits at an end that is closed gets `trio.ClosedResourceError`. There is no buffer of 0,
for a hand-over without a place in between has no order to decide.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable
from types import TracebackType
from typing import Any, Generic, Self, final

import attrs
import trio
from trio.lowlevel import checkpoint, current_task, enable_ki_protection

from stagetrio.fair_queue import FairQueue
from stagetrio.flow import T


@attrs.frozen
class FairChannelStatistics:
    """What the ``statistics`` of either end returns: the names are those of `trio.MemoryChannelStatistics`.

    Attributes:
        current_buffer_used: Items queued now.
        max_buffer_size: The bound on them.
        open_send_channels: Sending ends not closed.
        open_receive_channels: Receiving ends not closed.
        tasks_waiting_send: Tasks waiting for a place.
        tasks_waiting_receive: Tasks waiting for an item.
    """

    current_buffer_used: int
    max_buffer_size: float
    open_send_channels: int
    open_receive_channels: int
    tasks_waiting_send: int
    tasks_waiting_receive: int


def open_fair_channel(
    queue: FairQueue[Any, T], *, flow: Hashable = None
) -> tuple[FairSendChannel[T], FairReceiveChannel[T]]:
    """Return the two ends of a queue: ``send, receive = open_fair_channel(FairQueue(100))``.

    The queue can be used by its own methods beside them, as long as it is the ends that close it.

    Args:
        queue: What lies between the ends, with its bounds, weights and whatever else it does.
        flow: The flow of the sending end; None: one that nobody else has, as each clone's.

    Raises:
        TypeError: It is no queue.
    """
    if not isinstance(queue, FairQueue):
        raise TypeError(f"queue must be a FairQueue, such as FairQueue(100), not {queue!r}")
    ends = _Ends(queue)
    return FairSendChannel(ends, flow), FairReceiveChannel(ends)


class _Ends(Generic[T]):
    """A queue, and how many of its ends are open."""

    def __init__(self, queue: FairQueue[Any, T]) -> None:
        self.queue = queue
        self.senders = self.receivers = 0

    def statistics(self) -> FairChannelStatistics:
        figures = self.queue.statistics()
        return FairChannelStatistics(
            current_buffer_used=figures.items,
            max_buffer_size=figures.max_items,
            open_send_channels=self.senders,
            open_receive_channels=self.receivers,
            tasks_waiting_send=figures.tasks_waiting_send,
            tasks_waiting_receive=figures.tasks_waiting_receive,
        )


class _End(Generic[T]):
    """What both kinds of end have in common."""

    def __init__(self, ends: _Ends[T]) -> None:
        self._ends = ends
        self._closed = False

    def _check_open(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this end of the channel is closed")

    @abstractmethod
    def close(self) -> None:
        """Close this end."""

    async def aclose(self) -> None:
        """Do what `close` does.

        Checkpoints: Always; the end is closed even where it is cancelled.
        """
        self.close()
        await checkpoint()

    def statistics(self) -> FairChannelStatistics:
        """Return the state of the channel."""
        return self._ends.statistics()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


@final
class FairSendChannel(_End[T], trio.abc.SendChannel[T]):
    """The sending end; made by `open_fair_channel` and by `clone`."""

    def __init__(self, ends: _Ends[T], flow: Hashable) -> None:
        super().__init__(ends)
        self._channel = ends.queue.open_flow(object() if flow is None else flow)
        ends.senders += 1

    @property
    def flow(self) -> Hashable:
        """The flow it sends to."""
        flow: Hashable = self._channel.flow
        return flow

    def _check_heard(self) -> None:
        self._check_open()
        if not self._ends.receivers:
            raise trio.BrokenResourceError("every receiving end is closed")

    def send_nowait(self, value: T) -> None:
        """Queue an item, or refuse it at once.

        Raises:
            trio.WouldBlock: There is no place; it is an `Overloaded`, which says for how long.
            trio.ClosedResourceError: This end is closed.
            trio.BrokenResourceError: Every receiving end is closed.
        """
        self._check_heard()
        self._channel.send_nowait(value)

    async def send(self, value: T) -> None:
        """Queue an item; wait for a place where there is none.

        Raises:
            trio.ClosedResourceError: This end is closed, or was closed while this waited.
            trio.BrokenResourceError: Every receiving end is closed, or was closed while this waited.

        Checkpoints: Always. A cancelled send has not queued anything.
        """
        self._check_heard()
        await self._channel.send(value)

    def clone(self, flow: Hashable = None) -> FairSendChannel[T]:
        """Return another sending end, of a flow of its own.

        Args:
            flow: Its flow; None: one that nobody else has.

        Raises:
            trio.ClosedResourceError: This end is closed.
        """
        self._check_open()
        return FairSendChannel(self._ends, flow)

    @enable_ki_protection
    def close(self) -> None:
        """Send nothing more by this end; what is queued stays queued. The last one ends the channel."""
        if not self._closed:
            self._closed = True
            self._channel.close()
            self._ends.senders -= 1
            if not self._ends.senders:
                self._ends.queue.close()


@final
class FairReceiveChannel(_End[T], trio.abc.ReceiveChannel[T]):
    """The receiving end; made by `open_fair_channel` and by `clone`."""

    def __init__(self, ends: _Ends[T]) -> None:
        super().__init__(ends)
        self._waiting: set[trio.lowlevel.Task] = set()
        ends.receivers += 1

    def receive_nowait(self) -> T:
        """Return the next item in fair order.

        Raises:
            trio.WouldBlock: There is none now.
            trio.EndOfChannel: Every sending end is closed, and nothing is left.
            trio.ClosedResourceError: This end is closed.
        """
        self._check_open()
        return self._ends.queue.receive_nowait()

    @enable_ki_protection
    async def receive(self) -> T:
        """Wait for the next item in fair order.

        Raises:
            trio.EndOfChannel: Every sending end is closed, and nothing is left.
            trio.ClosedResourceError: This end is closed, or was closed while this waited.

        Checkpoints: Always. A cancelled receive has not taken anything.
        """
        self._check_open()
        task = current_task()
        self._waiting.add(task)
        try:
            return await self._ends.queue.receive()
        finally:
            self._waiting.remove(task)

    def clone(self) -> FairReceiveChannel[T]:
        """Return another receiving end; each item goes to one of them.

        Raises:
            trio.ClosedResourceError: This end is closed.
        """
        self._check_open()
        return FairReceiveChannel(self._ends)

    @enable_ki_protection
    def close(self) -> None:
        """Receive nothing more by this end. After the last one the queue takes nothing more, and keeps what it has."""
        if not self._closed:
            self._closed = True
            for task in self._waiting:
                self._ends.queue._outlet.send_away(task)
            self._ends.receivers -= 1
            if not self._ends.receivers:
                self._ends.queue.break_off()
