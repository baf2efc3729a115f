"""Say something to the echo server and print what comes back: ``python echo_client.py WORD... [--at ADDRESS]``."""

from __future__ import annotations

import argparse
import sys

import trio
from echo import Say, app

from stagetrio.client import open_client


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="+", metavar="WORD")
    parser.add_argument("--at", default="tcp://127.0.0.1:8800", metavar="ADDRESS")
    options = parser.parse_args()
    async with open_client(options.at, app.codec) as client:
        for word in options.words:
            reply = await client.ask(Say(word))
            print(reply.text)


if __name__ == "__main__":
    try:
        trio.run(main)
    except OSError as error:
        sys.exit(f"{error}; is the server running? stagetrio run examples/echo.py")
    except ValueError as error:  # of an address or a message
        sys.exit(str(error))
    except BaseExceptionGroup as group:
        # Ctrl-C is the way to leave; what the server said at its end has been printed.
        if group.split((KeyboardInterrupt, trio.BrokenResourceError))[1] is not None:
            raise
