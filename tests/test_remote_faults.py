"""Whatever a procedure does wrong is an answer to its caller; nobody else notices."""

from __future__ import annotations

import functools
import math
from collections.abc import Awaitable, Callable
from typing import Any

import attrs
import pytest
import trio
from remote_pairs import PAIRS, Pair, serving

from stagetrio.limiter import Overloaded
from stagetrio.remote import Procedures, RemoteError

procedures = Procedures()


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest) -> Pair:
    make: Callable[[], Pair] = request.param
    return make()


class Speechless(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


@attrs.frozen
class Checked:
    value: int = attrs.field()

    @value.validator
    def _check(self, attribute: object, value: int) -> None:
        if value == 0:
            raise ZeroDivisionError
        if value < 0:
            raise KeyError("negative")


@procedures.procedure
async def speechless(block: bool) -> None:
    if block:
        await trio.lowlevel.checkpoint()
    raise Speechless


@procedures.procedure
async def refuse(reason: str, retry_after: float) -> None:
    raise Overloaded(reason, retry_after)


@procedures.procedure
async def refuse_badly() -> None:
    raise Overloaded("\ud800", 1)


@procedures.procedure
async def take(value: Checked) -> int:
    return value.value


def with_database(procedure: Callable[[str, int], Awaitable[int]]) -> Callable[[int], Awaitable[int]]:
    @functools.wraps(procedure)
    async def with_one(number: int) -> int:
        return await procedure("database", number)

    return with_one


@procedures.procedure
@with_database
async def claims_another_signature(database: str, number: int) -> int:
    return number


@procedures.procedure
async def well() -> str:
    return "well"


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("speechless", [False], r"Speechless: \(its text cannot be had\)"),
        ("speechless", [True], r"Speechless: \(its text cannot be had\)"),
        ("take", [{"value": 0}], "TypeError: .*'value': ZeroDivisionError"),
        ("take", [{"value": -1}], "TypeError: .*'value': KeyError"),
        ("claims_another_signature", ["x", 1], "TypeError: .*takes 1 positional argument but 2 were given"),
    ],
)
async def test_a_fault_is_an_error_of_its_call(pair: Pair, name: str, arguments: list[Any], said: str) -> None:
    """However strange it is, the connection and its server go on."""
    async with serving(procedures, pair) as remote:
        with pytest.raises(RemoteError, match=said):
            await remote.call(name, *arguments)
        assert await remote.call(well) == "well"


@pytest.mark.parametrize(("retry_after", "told"), [(-1.0, 0.0), (math.nan, 0.0), (math.inf, math.inf), (2.5, 2.5)])
async def test_a_refusal_that_makes_no_sense_is_told_in_one_that_does(
    pair: Pair, retry_after: float, told: float
) -> None:
    """The caller must not take it for a broken connection."""
    async with serving(procedures, pair) as remote:
        with pytest.raises(Overloaded) as refusal:
            await remote.call(refuse, "queue", retry_after)
        assert (refusal.value.reason, refusal.value.retry_after) == ("queue", told)
        with pytest.raises(Overloaded):
            await remote.call(refuse_badly)
        assert await remote.call(well) == "well"
