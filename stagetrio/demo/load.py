"""The process of some of the clients: ``python -m stagetrio.demo.load GROUP,GROUP PORT STORM``.

Theory of operation. The load is open: a client sends by its schedule, whether it has been answered or not, and its
latencies count from the moment at which a message was *meant* to be sent. A server that stalls therefore cannot hide it
by stalling its clients too (coordinated omission). What is not answered `LINGER_SECONDS` after the end of the storm
counts as not served. The hogs know no schedule: for them a message is due when the socket takes it.

It speaks JSON lines with its parent, as a server's process does: says ``ready`` when all are connected, takes
``start``, says ``progress`` now and then and ``result`` at the end. It holds the connections until its parent closes
its input.
"""

from __future__ import annotations

import gc
import itertools
import json
import sys
from collections import defaultdict
from typing import Any

import trio

from stagetrio.codec import Closed, Failed, Refused
from stagetrio.demo.measure import StallClock, Tally, percentile
from stagetrio.demo.process import commands, say, trio_time
from stagetrio.demo.storm import CODEC, FRAMING, GROUPS, RATES, SLOW_BYTES_PER_SECOND, Ask, Query, Storm
from stagetrio.framing import ProtocolError

LINGER_SECONDS = 1.0
_PROGRESS_SECONDS = 0.25
_HOG_BURST = 16  # messages a hog writes at once


def tally_name(group: str, message: Any) -> str:
    """Under which name a message is counted: its group's, but the polite ones' two kinds of question apart."""
    if group != "polite":
        return group
    return "queries" if isinstance(message, Query) else "asks"


class Client:
    """One connection, and what is outstanding on it."""

    def __init__(self, group: str, number: int, stream: trio.SocketStream, tallies: dict[str, Tally]) -> None:
        self.group = group
        self.number = number
        self.port: int = stream.socket.getsockname()[1]
        self._stream = stream
        self._tallies = tallies
        self._outstanding: dict[int, tuple[float, Tally]] = {}  # {id: when it was due, and where it counts}
        self._ids = itertools.count(1)
        self._begin = 0.0

    async def take_part(self, storm: Storm, begin: float) -> None:
        """Play one client's part from Trio's time ``begin`` on, until cancelled; a lost connection is no error."""
        self._begin = begin
        async with trio.open_nursery() as nursery:
            if self.group == "slow":
                nursery.start_soon(self._dribble)
            else:
                nursery.start_soon(self._receive)
            if self.group in RATES:
                nursery.start_soon(self._send_by_schedule, storm)
            elif self.group == "hogs":
                nursery.start_soon(self._send_without_pause, storm)

    async def _send_by_schedule(self, storm: Storm) -> None:
        schedule = storm.schedule(self.group, self.number)
        for send in schedule:
            self._tally_of(send.message).at(send.at).offered += 1
        try:
            for send in schedule:
                await trio.sleep_until(self._begin + send.at)
                await self._stream.send_all(self._frame(send.message, send.at))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # what was offered and is not sent any more stays unserved

    async def _send_without_pause(self, storm: Storm) -> None:
        await trio.sleep_until(self._begin)
        question = Ask(f"now, now, now, says hog {self.number}!")
        tally = self._tally_of(question)
        try:
            while (now := trio.current_time() - self._begin) < storm.seconds:
                tally.at(now).offered += _HOG_BURST
                await self._stream.send_all(b"".join(self._frame(question, now) for _ in range(_HOG_BURST)))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    def _tally_of(self, message: Any) -> Tally:
        return self._tallies[tally_name(self.group, message)]

    def _frame(self, message: Any, due: float) -> bytes:
        id = next(self._ids)
        self._outstanding[id] = due, self._tally_of(message)
        return FRAMING.encode(CODEC.encode(message, id))

    async def _receive(self) -> None:
        decoder = FRAMING.decoder()
        try:
            async for data in self._stream:
                now = trio.current_time() - self._begin
                for frame in decoder.receive_data(bytes(data)):
                    self._take(*CODEC.decode(frame), now)
        except trio.BrokenResourceError:
            pass  # whom the server got rid of is seen by what it still holds

    def _take(self, reply: Any, id: int | None, now: float) -> None:
        if isinstance(reply, Closed):
            return
        if id is None or id not in self._outstanding:
            raise ProtocolError(f"a reply to a message that is not outstanding: {id}")
        due, tally = self._outstanding.pop(id)
        if isinstance(reply, Refused):
            tally.at(due).refused += 1
        elif isinstance(reply, Failed):
            tally.at(due).failed += 1
        else:
            tally.served(due, now)

    async def _dribble(self) -> None:
        """Read slowly: an eighth of a second's bytes, eight times a second; nothing is decoded."""
        try:
            while True:
                data = await self._stream.receive_some(SLOW_BYTES_PER_SECOND // 8)
                if not data:
                    return
                await trio.sleep(1 / 8)
        except trio.BrokenResourceError:
            pass


async def _connect(port: int, *, receive_buffer: int | None) -> trio.SocketStream:
    socket = trio.socket.socket()
    if receive_buffer is not None:
        # Before connecting: the window that a slow client advertises is a slow client's.
        socket.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_RCVBUF, receive_buffer)
    await socket.connect(("127.0.0.1", port))
    return trio.SocketStream(socket)


async def _report(tallies: dict[str, Tally]) -> None:
    while True:
        await trio.sleep(_PROGRESS_SECONDS)
        totals = {name: tally.total() for name, tally in tallies.items()}
        replies = {name: total.replies for name, total in totals.items()}
        late = {name: percentile(total.latencies, 0.99) for name, total in totals.items()}
        say(event="progress", replies=replies, p99=late)


async def main(groups: list[str], port: int, storm: Storm) -> None:
    """Connect, play the storm, say what came of it, and hold on until the parent closes our input."""
    tallies: defaultdict[str, Tally] = defaultdict(Tally)
    clients = [
        Client(group, number, await _connect(port, receive_buffer=4096 if group == "slow" else None), tallies)
        for group in groups
        for number in range(GROUPS[group])
    ]
    gc.freeze()
    stalls = StallClock()
    say(event="ready")
    orders = commands()
    order = await anext(orders, None)
    if order is None:
        return
    begin = trio_time(order["at"])
    async with trio.open_nursery() as nursery:
        for client in clients:
            nursery.start_soon(client.take_part, storm, begin)
        nursery.start_soon(stalls.run)
        nursery.start_soon(_report, tallies)
        await trio.sleep_until(begin)
        stalls.reset()
        await trio.sleep_until(begin + storm.seconds + LINGER_SECONDS)
        nursery.cancel_scope.cancel()
    say(
        event="result",
        tallies={name: tally.to_plain() for name, tally in tallies.items()},
        ports={group: [client.port for client in clients if client.group == group] for group in groups},
        worst_stall=stalls.worst,
    )
    async for _ in orders:
        pass


if __name__ == "__main__":
    trio.run(main, sys.argv[1].split(","), int(sys.argv[2]), Storm(**json.loads(sys.argv[3])))
