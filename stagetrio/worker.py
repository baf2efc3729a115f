"""A worker of a stage: the task, the handler it has in hand, and what waits behind that."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Coroutine, Generator, Hashable
from contextvars import copy_context
from time import perf_counter
from typing import Any, Generic, TypeVar

import trio
from trio.lowlevel import Task

from stagetrio.lane import Lane
from stagetrio.runs import Run

T = TypeVar("T")
Handling = Coroutine[Any, Any, object]


class Worker(Generic[T]):
    """A worker task, and, while its handler is occupied, the key in hand and what waits behind it."""

    __slots__ = (
        "begun",
        "cancelled",
        "context",
        "cost",
        "held",
        "item",
        "key",
        "lane",
        "occupied",
        "on_lane",
        "parked",
        "run",
        "scope",
        "since",
        "spent",
        "stale",
        "taken",
        "task",
    )

    def __init__(self, task: Task, lane: Lane | None) -> None:
        self.task = task
        self.lane = lane
        self.context = copy_context()  # what the next handler is to find
        self.stale = False  # it would not find that
        self.scope = trio.CancelScope()
        self.on_lane = False  # a handler, or a run of them, has begun on the lane and not ended
        self.occupied = False
        self.cancelled = False  # by `Stage.cancel`, not by its deadline
        self.item: T  # in hand
        self.run: Run[Any, T]  # to be settled: the one being served, or the item in hand as a run of its own
        self.taken = 0  # items of the run that are not settled, those parked left out
        self.cost = 0.0  # declared for those of them that have been served
        self.since = 0.0  # when the run began, by the real clock
        self.begun = 0.0  # when the item in hand began
        self.spent = 0.0  # seconds the item in hand has held the loop
        self.key: Any = None  # in hand; where handlers of one key may overlap: the key and a number
        self.parked: deque[Run[Any, T]] = deque()  # at most MAX_PARKED and what was left of a batch
        self.held: list[Hashable] = []  # flows held in the queue because they bring more of this key

    def take(self, run: Run[Any, T]) -> None:
        """Begin to serve a run."""
        self.run = run
        self.taken = len(run.items)
        self.since = self.begun

    def served(self) -> int:
        """How many items of the run have begun and are not settled."""
        return self.taken - len(self.run.items)

    def has_changed(self) -> bool:
        """Whether a handler has left a context variable set to something else, which the next one must not find."""
        return copy_context() != self.context


@types.coroutine
def resume(worker: Worker[Any], coroutine: Handling, trap: object) -> Generator[Any, Any, None]:
    """Run a handler to its end from its first wait, or from its start where trap is None, and meter its steps."""
    error: BaseException | None = None
    value: object = None
    while True:
        if trap is not None:
            error = None
            try:
                value = yield trap
            except BaseException as raised:  # goes on into the handler, whose affair it is
                error = raised
        begun = perf_counter()
        try:
            trap = coroutine.send(value) if error is None else coroutine.throw(error)
        except StopIteration:
            return
        finally:
            worker.spent += perf_counter() - begun
