"""An app from a script in several processes: what ``stagetrio run --processes`` does.

Each worker loads the script; the arbiter never does, so a script that breaks breaks a worker, and a reload gets the
script as it is then.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import trio

from stagetrio import prefork
from stagetrio.script import LOG_FORMAT, Mendable, check_addresses, kept, load, not_serving, say, unlistenable

FAREWELL_SECONDS = 5.0  # given to a worker process beyond the grace, to cancel what is left and end


def run(
    path: Path,
    *,
    addresses: Sequence[str],
    grace: float,
    processes: int,
    pid_path: Path | None = None,
    options: prefork.Options,
) -> int:
    """Serve the app of a script in worker processes until a signal ends it, by `stagetrio.prefork.serve`.

    Args:
        path: Of the script, which each worker loads, and this process does not.
        addresses: Where to listen.
        grace: Seconds for draining, 0 or more.
        processes: How many workers, 1 or more.
        pid_path: A file to keep the process id in.
        options: Others of `stagetrio.prefork.serve`.

    Returns:
        The exit status: 0 after a drain, 128 and the signal's number after a second signal, and that of the first
        worker, which has said why, if it could not get ready.

    Raises:
        Mendable: An address, the PID file or an option is not as it must be.
    """
    check_addresses(addresses)
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    options = {**options, "arguments": [str(path), grace], "grace": grace + FAREWELL_SECONDS}
    serve_all = partial(prefork.serve, f"{__name__}:serve_in_worker", addresses, processes=processes, **options)
    try:
        with kept(pid_path):
            return trio.run(serve_all)
    except prefork.CannotStart as error:
        return error.status
    except OSError as error:
        raise unlistenable(error) from None
    except ValueError as error:
        raise Mendable(f"{error}; give another value") from None


async def serve_in_worker(worker: prefork.Worker, path: str, grace: float) -> None:
    """Serve the app of a script in a worker process, from loading it to the end of its drain.

    Args:
        worker: What the arbiter gives.
        path: Of the script.
        grace: Seconds for draining; the arbiter leaves a little more.

    Raises:
        SystemExit: With status 2 when the script, or its app, is not as it must be: then one line on stderr says so.

    Checkpoints: throughout. A cancellation closes every connection without ceremony.
    """
    logging.basicConfig(level=logging.INFO, format=f"%(process)d {LOG_FORMAT}")
    failure: Exception | None = None
    try:
        app = load(Path(path))
        async with trio.open_nursery() as nursery:
            try:
                await nursery.start(app.serve_listeners, worker.listeners)
            except Exception as error:  # judged below, outside of the nursery, which would wrap it
                failure = error
            else:
                worker.ready()
                await worker.wait_drain()
                await app.drain(grace)
        if failure is not None:
            raise not_serving(failure, Path(path))
    except Mendable as error:
        say(f"stagetrio run: {error}")
        raise SystemExit(2) from None
