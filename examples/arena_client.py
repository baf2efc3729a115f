"""Log in, walk to the middle of the board, strike whoever is there, and print what happens."""

from __future__ import annotations

import argparse
import sys

import trio
from arena import Login, Move, Strike, app

from stagetrio.client import open_client


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--at", default="tcp://127.0.0.1:8800", metavar="ADDRESS")
    options = parser.parse_args()
    async with open_client(options.at, app.codec) as client:
        welcome = await client.ask(Login(options.name))
        print(f"{options.name} begins at {welcome.x}, {welcome.y}")
        for _ in range(options.steps):
            position = await client.ask(Move(1, 1))
        print(f"{options.name} stands at {position.x}, {position.y}")
        board = await client.receive()
        for name in board.positions:
            if name != options.name:
                verdict = await client.ask(Strike(name))
                print(f"{options.name} strikes {name}: {verdict.reason}")


if __name__ == "__main__":
    try:
        trio.run(main)
    except OSError as error:
        sys.exit(f"{error}; is the server running? stagetrio run examples/arena.py")
    except ValueError as error:  # of an address or a message
        sys.exit(str(error))
    except BaseExceptionGroup as group:
        # Ctrl-C is the way to leave; what the server said at its end has been printed.
        if group.split((KeyboardInterrupt, trio.BrokenResourceError))[1] is not None:
            raise
