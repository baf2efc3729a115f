"""Whose turn it is: rests and turns, arrivals and the overdue, shares by weight; pure, without a loop or a clock."""

from __future__ import annotations

import math
from collections.abc import Hashable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagetrio.turns import ARRIVALS, MAX_FLOWS, Turns

Q = 1.0


def overdue(turns: Turns[str], *waiters: str) -> None:
    """Let each hold the loop for a quantum, and wait for its next turn."""
    for waiter in waiters:
        turns.charge(waiter, Q)
        assert turns.wait(waiter, waiter, begun=True)


def test_a_pass_in_which_little_was_done_is_followed_by_a_turn() -> None:
    """There is a whole quantum to spend in every pass as long as nobody waits and less than a quarter is spent."""
    turns: Turns[str] = Turns(Q)
    for _ in range(3):
        turns.used = 0.2 * Q
        assert turns.next_pass() == []
        assert turns.used == 0


def test_a_pass_in_which_much_was_done_is_followed_by_a_rest() -> None:
    """In a rest there is nothing to spend; in the pass after it there is."""
    turns: Turns[str] = Turns(Q)
    turns.used = 0.3 * Q
    assert turns.next_pass() == []
    assert turns.used == Q
    assert turns.next_pass() == []
    assert turns.used == 0


def test_one_of_the_overdue_is_let_go_in_every_other_pass() -> None:
    """So that between two slices lies a pass in which everybody else runs."""
    turns: Turns[str] = Turns(Q)
    overdue(turns, "a", "b")
    let_go = []
    for _ in range(6):
        gone = turns.next_pass()
        let_go.append(gone)
        if gone:
            turns.used = Q
            overdue(turns, *gone)
    assert let_go == [[], ["a"], [], ["b"], [], ["a"]]


def test_arrivals_are_let_go_together_and_first_come_first_served() -> None:
    """Up to a bound; most end within microseconds."""
    turns: Turns[int] = Turns(Q)
    for number in range(ARRIVALS + 3):
        assert not turns.wait(number, number, begun=False)
    assert turns.next_pass() == []
    assert turns.next_pass() == list(range(ARRIVALS))
    assert turns.waiting == 3
    assert turns.next_pass() == []
    assert turns.next_pass() == list(range(ARRIVALS, ARRIVALS + 3))


def test_who_was_let_go_in_vain_keeps_its_place() -> None:
    """The others had spent the quantum; it does not go to the end of the line for that."""
    turns: Turns[str] = Turns(Q)
    turns.wait("late", "late", begun=False)
    turns.wait("early", "early", begun=False, again=True)
    turns.next_pass()
    assert turns.next_pass() == ["early", "late"]


def test_arrivals_and_the_overdue_alternate() -> None:
    """Neither a burst of newcomers nor a crowd of hogs can starve the other."""
    turns: Turns[str] = Turns(Q)
    overdue(turns, "hog", "hog2")
    order = []
    for number in range(4):
        turns.wait(f"new{number}", f"new{number}", begun=False)
        turns.next_pass()
        order += turns.next_pass()
    assert order == ["new0", "hog", "new1", "new2", "hog2"]


def test_a_flow_that_has_had_too_much_waits_with_the_overdue() -> None:
    """A new message of a hog's flow is no newcomer while others wait who have had less."""
    turns: Turns[str] = Turns(Q)
    overdue(turns, "other")
    turns.charge("hog", 5 * Q)
    assert turns.owes("hog")
    assert not turns.owes("newcomer")
    assert turns.wait("hog again", "hog", begun=False)
    turns.next_pass()
    assert turns.next_pass() == ["other"]


def test_nobody_owes_where_nobody_waits() -> None:
    """Turns are work-conserving: what has been had counts only against others."""
    turns: Turns[str] = Turns(Q)
    turns.charge("hog", 5 * Q)
    assert not turns.owes("hog")


def test_who_leaves_is_not_let_go() -> None:
    """A cancelled waiter is gone from the count and from the line, wherever it stood."""
    turns: Turns[str] = Turns(Q)
    overdue(turns, "a", "b")
    turns.wait("c", "c", begun=False)
    turns.wait("d", "d", begun=False)
    turns.leave("a")
    turns.leave("c")
    assert turns.waiting == 2
    gone = [waiter for _ in range(6) for waiter in turns.next_pass()]
    assert sorted(gone) == ["b", "d"]
    assert turns.waiting == 0


def test_leaving_again_and_again_does_not_pile_up() -> None:
    """Stale places in the line are swept."""
    turns: Turns[str] = Turns(Q)
    overdue(turns, "stays")
    for _ in range(1000):
        turns.wait("comes and goes", "comes and goes", begun=True)
        turns.leave("comes and goes")
    turns.next_pass()
    assert turns.next_pass() == ["stays"]
    assert turns.next_pass() == []
    assert turns.waiting == 0


@given(weights=st.lists(st.sampled_from([0.5, 1.0, 2.0, 4.0]), min_size=2, max_size=5))
def test_turns_are_shared_by_weight(weights: list[float]) -> None:
    """Flows that always want the loop get it in proportion to their weights, to within a slice or two each."""
    by_flow: dict[Hashable, float] = dict(enumerate(weights))
    turns: Turns[int] = Turns(Q, lambda flow: by_flow[flow])
    for flow in range(len(weights)):
        turns.charge(flow, Q)
        turns.wait(flow, flow, begun=True)
    had = [0] * len(weights)
    rounds = 400
    for _ in range(rounds):
        turns.next_pass()
        (flow,) = turns.next_pass()
        had[flow] += 1
        turns.charge(flow, Q)
        turns.wait(flow, flow, begun=True)
    for flow, weight in enumerate(weights):
        assert abs(had[flow] - rounds * weight / sum(weights)) <= 2 * max(weights) / min(weights) + 2


@given(
    moves=st.lists(
        st.tuples(st.sampled_from(["arrive", "overrun", "leave", "pass", "spend"]), st.integers(0, 7)), max_size=80
    )
)
def test_everyone_who_waits_is_let_go_once_or_has_left(moves: list[tuple[str, int]]) -> None:
    """Whatever comes in whatever order: nobody is forgotten, nobody is let go twice, and no pass exceeds its bound."""
    turns: Turns[int] = Turns(Q)
    waiting: set[int] = set()
    for move, who in moves:
        if move in ("arrive", "overrun") and who not in waiting:
            turns.charge(who, Q / 2)
            turns.wait(who, who, begun=move == "overrun")
            waiting.add(who)
        elif move == "leave" and who in waiting:
            turns.leave(who)
            waiting.remove(who)
        elif move == "spend":
            turns.used += Q / 8
        elif move == "pass":
            gone = turns.next_pass()
            assert set(gone) <= waiting
            assert len(gone) == len(set(gone)) <= ARRIVALS
            waiting -= set(gone)
        assert turns.waiting == len(waiting)
    for _ in range(4 * len(waiting) + 4):
        waiting -= set(turns.next_pass())
    assert not waiting


def test_flows_ahead_are_forgotten_beyond_a_bound() -> None:
    """Those that are least ahead go first; who owes most is remembered."""
    turns: Turns[Hashable] = Turns(Q)
    overdue_flow = "owes most"
    turns.charge(overdue_flow, 1000 * Q)
    turns.wait("waiter", "waiter", begun=True)
    for number in range(3 * MAX_FLOWS):
        turns.charge(number, Q * (1 + number % 7))
    assert turns.owes(overdue_flow)
    assert not all(turns.owes(number) for number in range(1, 3 * MAX_FLOWS, 7))


@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, math.nan])
def test_a_weight_that_is_none_is_refused(weight: float) -> None:
    """The flow is named with it."""
    turns: Turns[str] = Turns(Q, lambda flow: weight)
    with pytest.raises(ValueError, match=r"weight.*'the flow'"):
        turns.charge("the flow", 1)
