"""The line before tickets: whose turn it is, and what is remembered of those who have gone."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Hashable

import attrs
import pytest

from stagetrio.line import Line


@attrs.define(eq=False)
class Somebody:
    """A waiter."""

    flow: Hashable = None
    cost: int = 1
    key: Hashable = None
    number: int = 0
    waits: bool = False
    in_line: bool = False
    has_key: bool = False
    weight: float = 0.0
    booked: float = 0.0


def fill(line: Line[Somebody], flows: str, cost: int = 1) -> list[Somebody]:
    """Let one of each flow stand in line."""
    everybody = [Somebody(flow, cost) for flow in flows]
    for somebody in everybody:
        line.add(somebody)
    return everybody


def served(line: Line[Somebody], count: int) -> str:
    """The flows of the next so many, all of which there are."""
    taken = [line.take(1000) for _ in range(count)]
    return "".join(str(waiter.flow) for waiter in taken if waiter is not None)


def test_flows_take_turns() -> None:
    """Each flow is served once a round, however many of it wait."""
    line = Line[Somebody]()
    fill(line, "aaaabbc")
    assert served(line, 9) == "abcabaa"
    assert line.waiting == line.size == 0
    assert line.take(1) is None


def test_a_flow_that_comes_back_at_once_stands_behind_those_that_wait() -> None:
    """What a flow has had is remembered while others wait, and forgotten when nobody does."""
    line = Line[Somebody]()
    fill(line, "abc")
    assert served(line, 1) == "a"
    fill(line, "a")
    assert served(line, 3) == "bca"
    fill(line, "aab")
    assert served(line, 3) == "aba"


def test_a_flow_that_was_away_gets_no_credit() -> None:
    """A flow that did not wait, or gave up, while others were served, is not served twice when it comes back."""
    for gives_up in (False, True):
        line = Line[Somebody]()
        fill(line, "a" * 20 + "b" * 20)
        if gives_up:
            (early,) = fill(line, "c")
            line.remove(early)
        served(line, 12)
        fill(line, "cccc")
        turns = served(line, 9)
        assert turns.count("c") == 3
        assert turns.startswith("c" * 2) is False


def test_a_large_cost_counts_as_much() -> None:
    """A flow of large ones is served as much less often."""
    line = Line[Somebody]()
    fill(line, "a" * 10, cost=4)
    fill(line, "b" * 40)
    turns = served(line, 25)
    assert 4 <= turns.count("a") <= 6
    assert 19 <= turns.count("b") <= 21


def test_the_head_waits_until_it_fits() -> None:
    """Nobody is taken past a head that is too large, and the head when there is enough."""
    line = Line[Somebody]()
    (large,) = fill(line, "a", cost=3)
    (small,) = fill(line, "b")
    assert line.take(2) is None
    assert line.take(3) is large
    assert line.take(1) is small


def test_flows_that_came_behind_a_key_hide_nobody_who_gave_up() -> None:
    """The position stays exact after a flow had its only waiter behind a key, and another one gave up in the middle."""
    line = Line[Somebody]()
    for flow in "zy":
        line.add(Somebody(flow, key="k"))
    fill(line, "aaaabbbb")
    assert served(line, 2) == "za"  # and the place of "y" among the turns is gone
    first, middle, last = (waiter for waiter in line if waiter.flow == "a")
    line.remove(middle)
    *_, behind = (waiter for waiter in line if waiter.flow == "b")
    assert line.position(behind) == len(served(line, 6)) == 6
    assert not behind.waits
    assert first.waits is last.waits is False


def test_a_refund_gives_the_turn_back() -> None:
    """One that was taken and gave up after all has cost its flow nothing."""
    line = Line[Somebody]()
    fill(line, "aabb")
    for _ in range(5):
        taken = line.take(1)
        assert taken is not None
        line.refund(taken)
        fill(line, str(taken.flow))
    order = served(line, 4)
    assert order.count("a") == order.count("b") == 2
    line = Line[Somebody]()
    fill(line, "a" * 10 + "b" * 10)
    called = ""
    for _ in range(8):
        taken = line.take(1)
        assert taken is not None
        called += str(taken.flow)
        if taken.flow == "a":
            line.refund(taken)  # "a" gives up each time it is called, so it is always its turn
    assert called.count("b") == 1


def test_those_behind_a_key_come_in_the_order_they_arrived() -> None:
    """A waiter whose key comes free stands before those of its flow that arrived after it."""
    line = Line[Somebody]()
    line.take_key("k")
    behind = [Somebody("a", key="k") for _ in range(2)]
    others = [Somebody("a") for _ in range(3)]
    for somebody in (others[0], behind[0], others[1], behind[1], others[2]):
        line.add(somebody)
    assert (line.waiting, line.size) == (5, 3)
    assert line.take(1) is others[0]
    line.free_key("k")
    assert line.take(1) is behind[0]
    line.free_key("k")
    assert [line.take(1) for _ in range(4)] == [others[1], behind[1], others[2], None]
    assert line.busy("k")
    line.free_key("k")
    assert not line.busy("k")


def test_one_that_was_told_to_give_up_is_passed_over() -> None:
    """In line or behind a key, a waiter that is on its way out is not served, and its key goes on."""
    line = Line[Somebody]()
    first, second, third = (Somebody("a", key="k") for _ in range(3))
    for somebody in (first, second, third):
        line.add(somebody)
    second.waits = False
    first.waits = False
    assert line.take(1) is third
    line.remove(first)
    line.remove(second)
    line.free_key("k")
    assert (line.waiting, line.size, line.busy("k")) == (0, 0, False)


@pytest.mark.parametrize("seed", range(20))
def test_positions_are_the_turns(seed: int) -> None:
    """The positions are exact when all weigh and cost the same: they say who is served when."""
    chance = random.Random(seed)
    line = Line[Somebody]()
    everybody = fill(line, "".join(chance.choice("aaabbc") for _ in range(30)))
    for gone in chance.sample(everybody, 8):
        line.remove(gone)
        everybody.remove(gone)
    served(line, 4)
    everybody = [somebody for somebody in everybody if somebody.in_line]
    positions = {line.position(somebody): somebody for somebody in everybody}
    assert sorted(positions) == list(range(1, len(everybody) + 1))
    for position in sorted(positions):
        assert line.take(1) is positions[position]


def test_the_gone_are_forgotten() -> None:
    """Behind a head that blocks, any number may come and go, from one flow or many: what is kept stays small."""
    for flows in (1, 7, 100_000):
        line = Line[Somebody]()
        fill(line, "h", cost=1000)
        stay = [Somebody(0) for _ in range(2)]
        alive: weakref.WeakSet[Somebody] = weakref.WeakSet()
        most = 0
        line.add(stay[0])
        for number in range(5000):
            somebody = Somebody(number % flows)
            alive.add(somebody)
            line.add(somebody)
            if number == 10:
                line.add(stay[1])
            line.remove(somebody)
            del somebody
            if number % 500 == 0:
                gc.collect()
                most = max(most, len(alive))
        assert most <= 100
        assert line.waiting == 3
        assert line.take(999) is None


def test_flows_that_come_once_leave_no_trace() -> None:
    """While a flow always waits, 20,000 others come, are served and go: what is kept of them stays small."""
    line = Line[Somebody]()
    alive: weakref.WeakSet[Stranger] = weakref.WeakSet()
    fill(line, "h" * 2, cost=1)
    most = 0
    for number in range(20_000):
        stranger = Stranger()
        alive.add(stranger)
        line.add(Somebody(stranger))
        del stranger
        taken = line.take(1)
        assert taken is not None
        if taken.flow == "h":
            fill(line, "h")
        del taken
        if number % 1000 == 0:
            gc.collect()
            most = max(most, len(alive) - 3 * line.waiting)
    assert most <= 100  # twice those who wait, and a few more


class Stranger:
    """A flow of its own."""


def test_the_remaining_order_survives_a_sweep() -> None:
    """When the marks of the gone are swept, those who stay keep their turns."""
    line = Line[Somebody]()
    fill(line, "h", cost=1000)
    everybody = fill(line, "abcdefgh" * 60)
    for place, somebody in enumerate(everybody):
        if place % 8 != 0 and place % 16 != 3:
            line.remove(somebody)
    assert line.take(999) is None
    line.take(1000)
    left = line.waiting
    turns = served(line, left)
    assert turns[:58] == "ad" * 29 or turns[:58] == "da" * 29
    assert turns.count("a") == 60
    assert turns.count("d") == 30
