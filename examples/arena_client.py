"""Log in, walk to the middle of the board, strike whoever is there, and print what happens."""

from __future__ import annotations

import argparse

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
    trio.run(main)
