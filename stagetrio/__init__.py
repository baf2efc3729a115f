"""Structured concurrency for Trio servers that keep their pace.

The public names of the primitives. Each is imported from its module when it is first asked for, so whoever uses one
primitive pays for one, and ``import stagetrio`` costs next to nothing. `stagetrio.app` and what stands above it is
imported by its own name.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stagetrio.adaptive import AdaptiveLimiter as AdaptiveLimiter
    from stagetrio.admission import Admission as Admission
    from stagetrio.client import Client as Client
    from stagetrio.client import RequestFailed as RequestFailed
    from stagetrio.client import open_client as open_client
    from stagetrio.codec import Closed as Closed
    from stagetrio.codec import Codec as Codec
    from stagetrio.codec import Done as Done
    from stagetrio.codec import Failed as Failed
    from stagetrio.codec import Refused as Refused
    from stagetrio.datagrams import DatagramServer as DatagramServer
    from stagetrio.datagrams import serve_datagrams as serve_datagrams
    from stagetrio.fair_channel import open_fair_channel as open_fair_channel
    from stagetrio.fair_queue import Delivery as Delivery
    from stagetrio.fair_queue import FairQueue as FairQueue
    from stagetrio.framing import LengthPrefixed as LengthPrefixed
    from stagetrio.framing import Lines as Lines
    from stagetrio.framing import ProtocolError as ProtocolError
    from stagetrio.inflow import InputRates as InputRates
    from stagetrio.jobs import Again as Again
    from stagetrio.jobs import JobInterrupted as JobInterrupted
    from stagetrio.lease import LeaseLost as LeaseLost
    from stagetrio.limiter import FlowRateLimiter as FlowRateLimiter
    from stagetrio.limiter import Rate as Rate
    from stagetrio.limiter import RateLimiter as RateLimiter
    from stagetrio.nursery_pool import NurseryPool as NurseryPool
    from stagetrio.nursery_pool import open_nursery_pool as open_nursery_pool
    from stagetrio.overload import Overloaded as Overloaded
    from stagetrio.pacer import Pacer as Pacer
    from stagetrio.peer import Peer as Peer
    from stagetrio.preempt import no_preempt as no_preempt
    from stagetrio.priority import PriorityClass as PriorityClass
    from stagetrio.processes import ProcessPool as ProcessPool
    from stagetrio.processes import open_process_pool as open_process_pool
    from stagetrio.proxies import Proxies as Proxies
    from stagetrio.remote import Procedures as Procedures
    from stagetrio.remote import Remote as Remote
    from stagetrio.remote import RemoteError as RemoteError
    from stagetrio.remote import RemoteWorkers as RemoteWorkers
    from stagetrio.remote import WorkerLost as WorkerLost
    from stagetrio.remote import open_remote as open_remote
    from stagetrio.remote import open_remote_stream as open_remote_stream
    from stagetrio.remote import open_remote_workers as open_remote_workers
    from stagetrio.remote import serve_remote as serve_remote
    from stagetrio.remote import serve_remote_stream as serve_remote_stream
    from stagetrio.retry import RetryBudget as RetryBudget
    from stagetrio.rules import CloseReason as CloseReason
    from stagetrio.rules import PeerLimits as PeerLimits
    from stagetrio.server import StageServer as StageServer
    from stagetrio.server import serve_stage as serve_stage
    from stagetrio.shed import Shedder as Shedder
    from stagetrio.snapshot import Snapshot as Snapshot
    from stagetrio.sockets import open_datagram_sockets as open_datagram_sockets
    from stagetrio.sockets import open_listeners as open_listeners
    from stagetrio.sojourn import CoDel as CoDel
    from stagetrio.sources import Source as Source
    from stagetrio.stage import Stage as Stage
    from stagetrio.stall import Stall as Stall
    from stagetrio.threads import ThreadPool as ThreadPool
    from stagetrio.threads import open_thread_pool as open_thread_pool
    from stagetrio.ticket import Ticket as Ticket
    from stagetrio.ticket import TicketRequest as TicketRequest
    from stagetrio.ticket import TicketStage as TicketStage
    from stagetrio.tls import secure as secure
    from stagetrio.watchdog import BudgetExceeded as BudgetExceeded
    from stagetrio.watchdog import Watchdog as Watchdog
    from stagetrio.watchdog import open_watchdog as open_watchdog

__version__ = "0.1.0"

# {public name: its module}: for the interpreter what the imports above are for type checkers
_ROOMS = {
    "AdaptiveLimiter": "adaptive",
    "Admission": "admission",
    "Again": "jobs",
    "BudgetExceeded": "watchdog",
    "Client": "client",
    "CloseReason": "rules",
    "Closed": "codec",
    "CoDel": "sojourn",
    "Codec": "codec",
    "DatagramServer": "datagrams",
    "Delivery": "fair_queue",
    "Done": "codec",
    "Failed": "codec",
    "FairQueue": "fair_queue",
    "FlowRateLimiter": "limiter",
    "InputRates": "inflow",
    "JobInterrupted": "jobs",
    "LeaseLost": "lease",
    "LengthPrefixed": "framing",
    "Lines": "framing",
    "NurseryPool": "nursery_pool",
    "Overloaded": "overload",
    "Pacer": "pacer",
    "Peer": "peer",
    "PeerLimits": "rules",
    "PriorityClass": "priority",
    "Procedures": "remote",
    "ProcessPool": "processes",
    "ProtocolError": "framing",
    "Proxies": "proxies",
    "Rate": "limiter",
    "RateLimiter": "limiter",
    "Refused": "codec",
    "Remote": "remote",
    "RemoteError": "remote",
    "RemoteWorkers": "remote",
    "RequestFailed": "client",
    "RetryBudget": "retry",
    "Shedder": "shed",
    "Snapshot": "snapshot",
    "Source": "sources",
    "Stage": "stage",
    "StageServer": "server",
    "Stall": "stall",
    "ThreadPool": "threads",
    "Ticket": "ticket",
    "TicketRequest": "ticket",
    "TicketStage": "ticket",
    "Watchdog": "watchdog",
    "WorkerLost": "remote",
    "no_preempt": "preempt",
    "open_client": "client",
    "open_datagram_sockets": "sockets",
    "open_fair_channel": "fair_channel",
    "open_listeners": "sockets",
    "open_nursery_pool": "nursery_pool",
    "open_process_pool": "processes",
    "open_remote": "remote",
    "open_remote_stream": "remote",
    "open_remote_workers": "remote",
    "open_thread_pool": "threads",
    "open_watchdog": "watchdog",
    "secure": "tls",
    "serve_datagrams": "datagrams",
    "serve_remote": "remote",
    "serve_remote_stream": "remote",
    "serve_stage": "server",
}

__all__ = list(_ROOMS)


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
