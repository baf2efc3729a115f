"""A block served by tasks: what it raises comes out as itself, and the tasks end with it."""

from __future__ import annotations

import pytest
import trio

from stagetrio.backstage import open_backstage


class Servant:
    """Ends when cancelled, but takes its time."""

    def __init__(self) -> None:
        self.ended = False

    async def serve(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(1)
            self.ended = True


async def served_block(servant: Servant, error: type[BaseException]) -> None:
    async with open_backstage() as nursery:
        nursery.start_soon(servant.serve)
        await trio.lowlevel.checkpoint()
        raise error


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
async def test_an_error_leaves_as_itself(autojump_clock: object, error: type[BaseException]) -> None:
    """After the tasks have ended, and in no group."""
    servant = Servant()
    with pytest.raises(error):
        await served_block(servant, error)
    assert servant.ended


async def test_the_tasks_end_with_the_block(autojump_clock: object) -> None:
    """Nobody has to cancel them."""
    servant = Servant()
    async with open_backstage() as nursery:
        nursery.start_soon(servant.serve)
        await trio.lowlevel.checkpoint()
    assert servant.ended


async def test_a_cancellation_passes(autojump_clock: object) -> None:
    """It ends the block and the tasks, and is absorbed where it came from."""
    servant = Servant()
    with trio.move_on_after(5) as scope:
        async with open_backstage() as nursery:
            nursery.start_soon(servant.serve)
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert servant.ended


async def test_a_cancellation_on_the_way_out_takes_no_errors_place(autojump_clock: object) -> None:
    """The error comes out, though the scope is cancelled by the time the tasks have ended."""
    servant = Servant()
    raised: list[BaseException] = []
    with trio.move_on_after(0.5) as scope:
        try:
            await served_block(servant, KeyError)
        except KeyError as error:
            raised.append(error)
    assert servant.ended
    assert scope.cancel_called
    assert len(raised) == 1


async def test_a_task_that_fails_is_heard() -> None:
    """Its error comes out, and not the cancellation it has brought upon the block."""

    async def fail() -> None:
        await trio.lowlevel.checkpoint()
        raise KeyError("task")

    with pytest.RaisesGroup(pytest.RaisesExc(KeyError, match="task")):
        async with open_backstage() as nursery:
            nursery.start_soon(fail)
            await trio.sleep_forever()
