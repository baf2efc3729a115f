"""Structured concurrency for Trio servers that keep their pace."""

from __future__ import annotations

from stagetrio.codec import Closed, Codec, Failed, Refused
from stagetrio.fair_queue import Delivery, FairQueue
from stagetrio.framing import LengthPrefixed, Lines, ProtocolError
from stagetrio.lease import LeaseLost, Ticket
from stagetrio.limiter import FlowRateLimiter, Overloaded, Rate, RateLimiter
from stagetrio.nursery_pool import NurseryPool, open_nursery_pool
from stagetrio.pacer import Pacer
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
    "ProtocolError",
    "Rate",
    "RateLimiter",
    "Refused",
    "Snapshot",
    "Ticket",
    "TicketRequest",
    "TicketStage",
    "open_nursery_pool",
]
