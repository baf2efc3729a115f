"""What the storm is: who the clients are, what they send and when, and what an answer takes.

200 clients, in five groups. The polite, the burners and the slow send by a schedule that follows from the seed
alone; the hogs write whenever their socket takes more; the silent connect and say nothing.
"""

from __future__ import annotations

import random
import time

import attrs
import trio

from stagetrio.codec import Codec
from stagetrio.framing import LengthPrefixed

GROUPS = {"polite": 186, "hogs": 4, "burners": 4, "slow": 3, "silent": 3}
"""``{group: clients}``, 200 in all."""

RATES = {"polite": 5.0, "burners": 1.0, "slow": 5.0}
"""``{group: messages a second and client}`` of those that keep a schedule."""

BURN_SECONDS = 0.2
"""CPU time that the handler of one message of a burner takes, without awaiting."""

SLOW_BYTES_PER_SECOND = 1024
"""What a slow client reads."""

PAGE_BYTES = 48_000
"""The size of the replies that a slow client asks for."""

ONE_IN_QUERIES = 20
"""One in so many messages of the polite needs the database."""

DATABASE_LIMIT = 10
DATABASE_SECONDS = 0.005
DATABASE_SLOWER = 20

IDLE_SECONDS = 4.0
"""How long either server lets a client say nothing."""

SEND_SECONDS = 3.0
"""How long either server lets a client not take what is sent to it."""


@attrs.frozen
class Ask:
    """A small question: what the polite and the hogs send."""

    text: str


@attrs.frozen
class Query:
    """A question that needs the database."""

    key: int


@attrs.frozen
class Judge:
    """A question that takes the CPU for a while: what the burners send."""

    rounds: int


@attrs.frozen
class Fetch:
    """A question with a long answer: what the slow send."""

    size: int


@attrs.frozen
class Answer:
    """The answer to an `Ask`, a `Query` or a `Judge`."""

    text: str


@attrs.frozen
class Page:
    """The answer to a `Fetch`."""

    content: bytes


Message = Ask | Query | Judge | Fetch | Answer | Page

FRAMING = LengthPrefixed(65536)
CODEC: Codec[Message] = Codec([Ask, Query, Judge, Fetch, Answer, Page])


@attrs.frozen
class Send:
    """One message that a client is going to send.

    Args:
        at: Seconds after the start of the storm.
        message: What is sent.
    """

    at: float
    message: Ask | Query | Judge | Fetch


@attrs.frozen
class Storm:
    """One storm; equal storms send the same messages at the same times.

    Args:
        seconds: How long it lasts.
        seed: Decides who sends what and when.
        rounds: Rounds of `judge` that take `BURN_SECONDS` of CPU time on this machine (`rounds_of`).
    """

    seconds: float = attrs.field()
    seed: int = 0
    rounds: int = 1

    @seconds.validator
    def _check_seconds(self, attribute: attrs.Attribute[float], value: float) -> None:
        if not 0 < value < 3600:
            raise ValueError(f"seconds must be above 0 and below 3600, not {value!r}")

    @property
    def database_slow(self) -> tuple[float, float]:
        """When the database is slow, which is 3 s in the middle, or a third of a storm shorter than 9 s."""
        half = min(3.0, self.seconds / 3) / 2
        return self.seconds / 2 - half, self.seconds / 2 + half

    def schedule(self, group: str, client: int) -> list[Send]:
        """What one client sends, in order: one message in each period of its rate, at a random moment of it."""
        rate = RATES[group]
        random_ = random.Random(f"{self.seed}/{group}/{client}")
        sends = []
        for number in range(round(self.seconds * rate)):
            at = (number + random_.random()) / rate
            sends.append(Send(at, self._message(group, random_)))
        return sends

    def _message(self, group: str, random_: random.Random) -> Ask | Query | Judge | Fetch:
        if group == "burners":
            return Judge(self.rounds)
        if group == "slow":
            return Fetch(PAGE_BYTES)
        if random_.randrange(ONE_IN_QUERIES) == 0:
            return Query(random_.randrange(1_000_000))
        return Ask(f"how goes it, number {random_.randrange(1_000_000)}?")


class Database:
    """A database that takes `DATABASE_LIMIT` queries at once, as long as it is asked politely.

    The time of a query is 5 ms, or twenty times that while it is slow.
    """

    def __init__(self) -> None:
        self.queries = 0
        self.most_at_once = 0
        self._at_once = 0
        self._slow = (0.0, 0.0)

    def slow_between(self, begin: float, end: float) -> None:
        """Be slow between two times of Trio's clock."""
        self._slow = (begin, end)

    async def query(self, key: int) -> str:
        """Look ``key`` up.

        Raises:
            RuntimeError: More than `DATABASE_LIMIT` queries at once.
        """
        if self._at_once >= DATABASE_LIMIT:
            raise RuntimeError(f"too many queries at once: the database takes {DATABASE_LIMIT}")
        self.queries += 1
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            slow = self._slow[0] <= trio.current_time() < self._slow[1]
            await trio.sleep(DATABASE_SECONDS * (DATABASE_SLOWER if slow else 1))
        finally:
            self._at_once -= 1
        return f"row {key}"


def judge(rounds: int) -> int:
    """Keep the CPU busy for a fixed amount of work, whatever runs in between; the result depends on each round."""
    state = 1
    for _ in range(rounds):
        state = (state * 1103515245 + 12345) & 0x7FFFFFFF
    return state


def rounds_of(cpu_seconds: float) -> int:
    """Measure how many rounds of `judge` take ``cpu_seconds`` on this machine: the fastest of five trials counts.

    A fixed amount of work, not a loop that watches the clock: a handler which is stopped and resumed would otherwise
    take the others' time for its own, and burn less.
    """
    trial = 100_000
    fastest = min(_cpu_seconds_of(trial) for _ in range(5))
    return max(1, round(trial * cpu_seconds / fastest))


def _cpu_seconds_of(rounds: int) -> float:
    begin = time.thread_time()
    judge(rounds)
    return max(time.thread_time() - begin, 1e-9)
