"""Classes of flows, of which the first that has items is served.

Theory of operation
===================

Each class has a fair order of its own. The classes are served strictly in the order in which they are given: while a
flow of the first has items, nothing of the second is taken. Strict priority starves, so a class can have a *reserve*, a
share of the work which it gets whenever it has items, whatever comes before it.

The reserve is kept by a balance for each class: every piece of work adds the class's share of it, the class's own work
is taken off. The balance is 0 when nothing of the class can be served, and does not fall further below 0 than what was
booked for the class last: what a class got beyond its reserve, because nobody else wanted it, is not held against it
later, and a reserve that was not used is not saved.

Only booked work moves the balance. What is in hand counts beside it, by its estimates and as long as it is in hand: a
class is served first when its balance, with its share of all that is in hand added and its own taken off, is above 0.
So a first guess that is wrong by orders of magnitude does no harm once the item is settled.

Source: strict priority with a minimum share is CBQ's (Floyd and Jacobson, 1995) in its simplest form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic

import attrs

from stagetrio.fair_order import FairOrder
from stagetrio.flow import Delivery, F, Flow, T
from stagetrio.sojourn import CoDel, check_codel


def _check_reserve(_: object, __: object, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"reserve must be a number, not {value!r}")
    if not 0 <= value < 1:
        raise ValueError(f"reserve must be at least 0 and below 1, not {value!r}")


def _check_name(_: object, __: object, value: str) -> None:
    if not isinstance(value, str):
        raise TypeError(f"name must be a string, not {value!r}")


def _check_codel(_: object, __: object, value: CoDel | None) -> None:
    check_codel(value)


@attrs.frozen
class PriorityClass:
    """A class of flows.

    Args:
        name: What the queue's ``class_of`` returns for its flows.
        reserve: The share of the work it gets whenever it has items, whatever stands before it; ≥ 0, < 1.
        codel: How long its items may wait; None: as long as it takes.
    """

    name: str = attrs.field(validator=_check_name)
    reserve: float = attrs.field(default=0.0, validator=_check_reserve)
    codel: CoDel | None = attrs.field(default=None, validator=_check_codel)


class _Class(Generic[F, T]):
    __slots__ = ("balance", "latest", "order", "reserve", "seen")

    def __init__(self, order: FairOrder[F, T], reserve: float) -> None:
        self.order = order
        self.reserve = reserve
        self.balance = 0.0
        self.latest = 0.0  # what was booked last
        self.seen = 0.0  # its work when balances were drawn last


class PriorityOrder(Generic[F, T]):
    """Fair orders, one for each class, in one.

    Args:
        classes: The classes, the one that comes first first.
        class_of: The name of a flow's class, asked when the flow is first seen.
        weight: The weight of a flow within its class.
    """

    def __init__(
        self,
        classes: Sequence[PriorityClass],
        class_of: Callable[[F], str],
        weight: Callable[[F], float] | None,
    ) -> None:
        self._class_of = class_of
        self.flows: dict[F, Flow[F, T]] = {}
        self.woken: list[Flow[F, T]] = []  # never used: each class's order has its own
        self._classes: dict[str, _Class[F, T]] = {}
        self.codel: dict[Any, CoDel | None] = {}
        for each in classes:
            if each.name in self._classes:
                raise ValueError(f"classes must have different names, not {each.name!r} twice")
            order: FairOrder[F, T] = FairOrder(weight=weight, flows=self.flows)
            self._classes[each.name] = _Class(order, each.reserve)
            self.codel[order] = each.codel
        if sum(each.reserve for each in classes) >= 1:
            raise ValueError(f"the reserves must leave something, not {[each.reserve for each in classes]!r}")
        self._in_turn = list(self._classes.values())
        self._reserved = any(each.reserve for each in classes)

    @property
    def backlogged(self) -> int:
        """The number of flows with items."""
        return sum(each.order.backlogged for each in self._in_turn)

    @property
    def in_hand(self) -> int:
        """Deliveries taken and not settled."""
        return sum(each.order.in_hand for each in self._in_turn)

    @property
    def lost(self) -> int:
        """Those of them that were dropped and are not booked yet."""
        return sum(each.order.lost for each in self._in_turn)

    def flow(self, key: F, weight: float | None = None) -> Flow[F, T]:
        """Return the record of a flow, a new one where there is none."""
        record = self.flows.get(key)
        if record is not None:
            return record.order.flow(key, weight)  # type: ignore[no-any-return]
        name = self._class_of(key)
        if name not in self._classes:
            raise ValueError(f"class_of must return one of {list(self._classes)!r}, not {name!r}")
        return self._classes[name].order.flow(key, weight)

    def push(self, record: Flow[F, T], item: T, cost: float) -> None:
        """Append one item to its flow."""
        record.order.push(record, item, cost)

    def head(self) -> Flow[F, T] | None:
        """Return the flow to be served next; None when none can be served."""
        chosen = self._choose()
        return None if chosen is None else chosen.order.head()

    def _choose(self) -> _Class[F, T] | None:
        heads = [each for each in self._in_turn if each.order.backlogged and each.order.head() is not None]
        if not self._reserved:
            return heads[0] if heads else None
        self._draw_balances()
        in_hand = sum(each.order.reserved for each in self._in_turn)
        for each in heads:
            if each.balance + each.reserve * in_hand - each.order.reserved > 0:
                return each
        return heads[0] if heads else None

    def _draw_balances(self) -> None:
        for each in self._in_turn:
            if each.order.abandoned:
                each.order.settle_abandoned()
        done = [each.order.work - each.seen for each in self._in_turn]
        total = sum(done)
        for each, own in zip(self._in_turn, done, strict=True):
            each.seen += own
            if own > 0:
                each.latest = own
            balance = each.balance + each.reserve * total - own
            each.balance = max(balance, -each.latest) if each.order.servable else 0.0

    def take_items(self, max_items: int) -> list[T]:
        """Remove up to ``max_items`` items, each booked at its declared cost."""
        taken: list[T] = []
        while len(taken) < max_items and (chosen := self._choose()) is not None:
            taken += chosen.order.take_items(1 if self._reserved else max_items - len(taken))
        return taken

    def take(self, max_items: int) -> list[Delivery[F, T]]:
        """Remove up to ``max_items`` items; each reserves an estimate until it is settled."""
        taken: list[Delivery[F, T]] = []
        while len(taken) < max_items and (chosen := self._choose()) is not None:
            taken += chosen.order.take(1 if self._reserved else max_items - len(taken))
        return taken
