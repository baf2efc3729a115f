"""Structured concurrency for Trio servers that keep their pace."""

from __future__ import annotations

from stagetrio.codec import Closed, Codec, Failed, Refused
from stagetrio.fair_queue import Delivery, FairQueue
from stagetrio.framing import LengthPrefixed, Lines, ProtocolError
from stagetrio.lease import LeaseLost, Ticket
from stagetrio.limiter import FlowRateLimiter, Overloaded, Rate, RateLimiter
from stagetrio.nursery_pool import NurseryPool, open_nursery_pool
from stagetrio.pacer import Pacer
from stagetrio.remote import (
    Procedures,
    Remote,
    RemoteError,
    WorkerLost,
    open_remote,
    open_remote_stream,
    serve_remote,
    serve_remote_stream,
)
from stagetrio.snapshot import Snapshot
from stagetrio.ticket import TicketRequest, TicketStage

__version__ = "0.1.0"

__all__ = [
    "Closed",
    "Codec",
    "Delivery",
    "Failed",
    "FairQueue",
    "FlowRateLimiter",
    "LeaseLost",
    "LengthPrefixed",
    "Lines",
    "NurseryPool",
    "Overloaded",
    "Pacer",
    "Procedures",
    "ProtocolError",
    "Rate",
    "RateLimiter",
    "Refused",
    "Remote",
    "RemoteError",
    "Snapshot",
    "Ticket",
    "TicketRequest",
    "TicketStage",
    "WorkerLost",
    "open_nursery_pool",
    "open_remote",
    "open_remote_stream",
    "serve_remote",
    "serve_remote_stream",
]
