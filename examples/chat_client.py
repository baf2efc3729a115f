"""Join a room, send each line of standard input, print what others say; the end of input leaves."""

from __future__ import annotations

import argparse
import sys

import trio
from chat import Join, Said, Say, app

from stagetrio.client import Client, open_client


async def listen(client: Client) -> None:
    async for message in client:
        if isinstance(message, Said):
            print(f"{message.name}: {message.text}", flush=True)
    print(f"({client.close_reason})", flush=True)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--room", default="lobby")
    parser.add_argument("--name", required=True)
    parser.add_argument("--at", default="tcp://127.0.0.1:8800", metavar="ADDRESS")
    options = parser.parse_args()
    join = Join(options.room, options.name)
    async with open_client(options.at, app.codec) as client, trio.open_nursery() as nursery:
        members = await client.ask(join)
        print(f"in {options.room}: {', '.join(members.names)}", flush=True)
        nursery.start_soon(listen, client)
        async for line in trio.wrap_file(sys.stdin):
            try:
                message = Say(line.rstrip("\n"))
            except ValueError as error:  # too long
                print(error, flush=True)
            else:
                await client.ask(message)  # the reply, though empty, says that it has been passed on
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    try:
        trio.run(main)
    except OSError as error:
        sys.exit(f"{error}; is the server running? stagetrio run examples/chat.py")
    except ValueError as error:  # of an address or a message
        sys.exit(str(error))
    except BaseExceptionGroup as group:
        # Ctrl-C is the way to leave; what the server said at its end has been printed.
        if group.split((KeyboardInterrupt, trio.BrokenResourceError))[1] is not None:
            raise
