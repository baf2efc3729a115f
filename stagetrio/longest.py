"""Which flow has the most items.

Flows are filed under their lengths when they grow. They are not when they shrink: whoever looks for the longest finds
the flow under a length it does not have any more, and files it where it belongs. So growing costs two dict operations,
being served nothing, and finding the longest what was put off, which is O(1) per item sent.
"""

from __future__ import annotations

from typing import Any

from stagetrio.flow import Flow


class Longest:
    """{length: flows that had it when they were filed}, and where each is filed."""

    def __init__(self) -> None:
        self._by_length: dict[int, dict[Flow[Any, Any], None]] = {}
        self._filed: dict[Flow[Any, Any], int] = {}
        self._top = 0  # no flow is filed under more
        self._sweep_at = 64

    def grown(self, record: Flow[Any, Any]) -> None:
        """Take note that a flow is about to get one item more."""
        length = len(record) + 1
        if length > self._filed.get(record, 0):
            self._file(record, length)
            if len(self._filed) > self._sweep_at:
                self._sweep()

    def find(self) -> Flow[Any, Any] | None:
        """Return a flow with two items or more than which none has more; None where there is none."""
        while self._top > 1:
            flows = self._by_length.get(self._top)
            if not flows:
                self._by_length.pop(self._top, None)
                self._top -= 1
                continue
            record = next(reversed(flows))
            if len(record) == self._top:
                return record
            self._file(record, len(record))
        return None

    def _file(self, record: Flow[Any, Any], length: int) -> None:
        old = self._filed.pop(record, 0)
        if old:
            del self._by_length[old][record]
        if length:
            self._filed[record] = length
            self._by_length.setdefault(length, {})[record] = None
            self._top = max(self._top, length)

    def _sweep(self) -> None:
        """Forget the flows that have no items any more, so that memory is bounded by those that have."""
        for record in [record for record in self._filed if not len(record)]:
            self._file(record, 0)
        self._sweep_at = 64 + 2 * len(self._filed)
