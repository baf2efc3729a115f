"""The progress values of one job, on their way to whoever started it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Any, Generic, TypeVar

import trio

from stagetrio.calls import Call

R = TypeVar("R")


class Progress(Generic[R]):
    """A running job, to iterate over: yields what the job passes to `stagetrio.jobs.report`.

    Made by ``pool.run``. Entering the block submits the job, leaving it early cancels the job. An error of the job is
    raised where its end would be seen: by the iteration, by `result`, or, if neither was asked, by leaving the block.

    Args:
        start: submits the call.
        leave: awaited when the block is left: gives the call up where it has not ended.
    """

    def __init__(self, call: Call, start: Callable[[], object], leave: Callable[[], Awaitable[None]]) -> None:
        self._call = call
        self._start = start
        self._leave = leave
        self._seen = False  # the end was seen by the caller

    async def __aenter__(self) -> Progress[R]:
        await trio.lowlevel.checkpoint()
        self._start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        ended = self._call.answered
        await self._leave()
        if error is None:
            if ended and not self._seen:
                self._call.unwrap()
            await trio.lowlevel.checkpoint()

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        """The next progress value.

        Checkpoints: always; a cancelled call has taken no value.
        """
        call = self._call
        await trio.lowlevel.checkpoint()
        while True:
            if call.progress:
                value = call.progress.popleft()
                call.took_progress()
                return value
            if call.answered:
                self._seen = True
                call.unwrap()
                raise StopAsyncIteration
            await call.wakeup.wait()

    async def result(self) -> R:
        """Wait for the job's end, passing over progress that was not iterated over, and return its value.

        Checkpoints: always; cancelled, the job goes on until the block is left.
        """
        async for _ in self:
            pass
        self._seen = True
        value: R = self._call.unwrap()
        return value
