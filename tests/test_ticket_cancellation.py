"""Tickets and limits with a cancellation at every checkpoint: cancel the k-th, for every k."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import trio
from cancel_everywhere import Use, cancel_everywhere

from stagetrio.all_tickets import all_tickets
from stagetrio.limiter import AdaptiveLimiter, Overloaded, Rate, RateLimiter
from stagetrio.ticket import LeaseLost, TicketStage


class Inside:
    """Counts the holders, and never lets them be more than they may."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.now = 0

    async def stay(self, cost: int = 1) -> None:
        self.now += cost
        assert self.now <= self.most
        try:
            await trio.sleep(1)
        finally:
            self.now -= cost


@pytest.mark.parametrize("source", ["int", "limiter", "adaptive"])
@pytest.mark.parametrize("options", [{}, {"lease": 5}, {"lease": 0.5}, {"max_wait": 1.5}, {"cost": 2}, {"key": "k"}])
def test_a_ticket_survives_a_cancellation_anywhere(source: str, options: dict[str, Any]) -> None:
    """Wherever the victim is cancelled the others are all served, and every ticket comes back."""
    sources: dict[str, Callable[[], Any]] = {
        "int": lambda: 2,
        "limiter": lambda: trio.CapacityLimiter(2),
        "adaptive": lambda: AdaptiveLimiter(2, max_limit=2),
    }

    def make() -> tuple[Use, Use, Callable[[], None]]:
        asked = {name: value for name, value in options.items() if name in ("cost", "key", "lease")}
        stage = TicketStage("victim", sources[source](), max_wait=options.get("max_wait", math.inf))
        inside = Inside(2)

        async def use() -> None:
            for _ in range(2):
                with contextlib.suppress(LeaseLost, Overloaded):
                    async with stage.ticket("flow", **asked):
                        await inside.stay(asked.get("cost", 1))

        def check() -> None:
            figures = stage.statistics()
            assert (figures.held, figures.holders, figures.waiting) == (0, 0, 0)
            with stage.ticket_nowait(cost=2, key="k"):
                pass

        return use, use, check

    assert cancel_everywhere(make) >= 5


def test_tickets_together_survive_a_cancellation_anywhere() -> None:
    """The victim of several stages gives back whatever it holds, wherever it is cancelled."""

    def make() -> tuple[Use, Use, Callable[[], None]]:
        stages = [TicketStage("a", 1, lease=10), TicketStage("b", 1), TicketStage("c", trio.CapacityLimiter(1))]
        inside = Inside(1)

        async def use() -> None:
            async with all_tickets(*(stage.ticket() for stage in reversed(stages))):
                await inside.stay()

        def check() -> None:
            assert [stage.statistics().held for stage in stages] == [0, 0, 0]

        return use, use, check

    assert cancel_everywhere(make) >= 5


def test_a_tree_of_rates_survives_a_cancellation_anywhere() -> None:
    """A victim in any line of the tree draws from all limits or from none, and the next in line moves up."""

    def make() -> tuple[Use, Use, Callable[[], None]]:
        root = RateLimiter(Rate(1), burst=2)
        leaf = RateLimiter(Rate(2), burst=3, parent=root)

        async def use() -> None:
            for _ in range(2):
                await leaf.acquire(1.5)

        def check() -> None:
            assert root.statistics().waiting == leaf.statistics().waiting == 0
            assert root.statistics().passed == leaf.statistics().passed in (6, 7, 8)

        return use, use, check

    assert cancel_everywhere(make) >= 5


def test_messages_survive_a_cancellation_anywhere() -> None:
    """A cancelled receive has taken nothing: what is read after it is the whole rest, in order."""

    def make() -> tuple[Use, Use, Callable[[], None]]:
        stage = TicketStage("room", 1)
        ticket = stage.ticket_nowait()
        heard: list[int] = []

        async def listen() -> None:
            while len(heard) < 3:
                heard.append(await ticket.messages.receive())

        async def speak() -> None:
            await trio.sleep(1)
            stage.broadcast(stage.statistics().broadcasts)

        def check() -> None:
            assert heard + list(ticket.messages) == [0, 1, 2]

        return listen, speak, check

    assert cancel_everywhere(make) >= 4
