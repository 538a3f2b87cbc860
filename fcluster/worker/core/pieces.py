"""How large an epoch may be while fcluster looks for the record that keeps epochs from being committed.

Responsible for: the number of records in an epoch after one has failed because of its data, so that in the
end an epoch has only one record; and the back-off between replays that make no progress. Each failure makes
the pieces smaller. Once the record is condemned, or isn't found for a while, commits make them larger again.

Must not: know which record it is, or what happens to it. Pure.
"""

from __future__ import annotations

import re

FACTOR = 8
"""Pieces shrink and grow by this factor. One record among 4,096 is found with at most four failures and 28
commits.
"""
LOOKING_COMMITS_MAX = FACTOR + 1
"""After this many commits of one size, the record is no longer at the front."""
LARGE_RECORDS = 4_096
"""Pieces that would be larger than this have no limit."""
WAIT_STEP_MS = 100
WAIT_MS_MAX = 2_000
_NUMBERS = re.compile(r"\d+")


class Pieces:
    """The limit on an epoch's records.

    Attributes:
        records_max: the most records of an epoch. None: no limit, and epochs overlap as usual. With a limit,
            nothing is processed after an epoch before it is committed, so that a failure certainly belongs to
            that epoch.
    """

    def __init__(self) -> None:
        self.records_max: int | None = None
        self._looking = False
        self._commits = 0

    def failed(self, records: int) -> None:
        """An epoch of this many records can't be committed because of its data."""
        size = records if self.records_max is None else min(records, self.records_max)
        self.records_max = max(1, size // FACTOR)
        self._looking = True
        self._commits = 0

    def condemned(self) -> None:
        """The record was found. It will fail by itself when it comes again."""
        self._looking = False

    def committed(self, records: int) -> None:
        """An epoch of this many records was committed."""
        if self.records_max is None or not records:
            return
        self._commits += 1
        if self._looking and self._commits < LOOKING_COMMITS_MAX:
            return
        self._looking = False
        self._commits = 0
        grown = self.records_max * FACTOR
        self.records_max = grown if grown <= LARGE_RECORDS else None


class Replays:
    """Counts replays for the same reason without a commit in between, and makes them back off.

    Attributes:
        due_ms: the next replay doesn't begin before this time.
    """

    def __init__(self) -> None:
        self.due_ms = 0
        self._reason = ""
        self._times = 0

    def failed(self, reason: str, now_ms: int) -> int:
        """An epoch failed. Returns how often in a row one has failed for this reason. Reasons that differ
        only in numbers count as the same.
        """
        reason = _NUMBERS.sub("#", reason)
        self._times = self._times + 1 if reason == self._reason else 1
        self._reason = reason
        self.due_ms = now_ms + min(WAIT_STEP_MS * (self._times - 1), WAIT_MS_MAX)
        return self._times

    def committed(self) -> None:
        """An epoch was committed, so there is progress."""
        self.due_ms = 0
        self._reason = ""
        self._times = 0
