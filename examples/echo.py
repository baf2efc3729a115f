"""The smallest app: whatever is said comes back.

    stagetrio run examples/echo.py
    python examples/echo_client.py hello
"""

from __future__ import annotations

from typing import Any

import attrs

from stagetrio.app import App
from stagetrio.peer import Peer

app = App("echo")


@attrs.frozen
class Say:
    text: str


@app.on(Say)
async def echo(peer: Peer[Any], message: Say) -> Say:
    return message
