"""How large an epoch may be while the record is looked for that keeps epochs from being committed.

Responsible for: the number of records of an epoch after one has failed because of its data, so that in the
end one record stands alone; and the waits between replays that don't get on. Each failure makes the pieces
smaller; once the record is condemned, or isn't found for a while, commits make them larger again.

Must not: know which record it is, or what becomes of it. Pure.
"""

from __future__ import annotations

import re

FACTOR = 8
"""Pieces shrink and grow by this: a record among 4,096 is found with four failures and 28 commits at most."""
LOOKING_COMMITS_MAX = FACTOR + 1
"""After so many commits of one size, the record that was looked for isn't in front any more."""
LARGE_RECORDS = 4_096
"""Pieces that would be larger than this have no bound of their own."""
WAIT_STEP_MS = 100
WAIT_MS_MAX = 2_000
_NUMBERS = re.compile(r"\d+")


class Pieces:
    """The bound on an epoch's records.

    Attributes:
        records_max: of an epoch; None: no bound, and epochs overlap as ever. With a bound, nothing is
            processed behind an epoch before that is committed, so that a failure is that epoch's for certain.
    """

    def __init__(self) -> None:
        self.records_max: int | None = None
        self._looking = False
        self._commits = 0

    def failed(self, records: int) -> None:
        """An epoch of so many records can't be committed because of what is in it."""
        size = records if self.records_max is None else min(records, self.records_max)
        self.records_max = max(1, size // FACTOR)
        self._looking = True
        self._commits = 0

    def condemned(self) -> None:
        """The record is found: it is going to fail by itself when it comes again."""
        self._looking = False

    def committed(self, records: int) -> None:
        """An epoch of so many records was committed."""
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
    """Counts replays for one reason without a commit in between, and makes them wait for each other.

    Attributes:
        due_ms: the next one begins then, not before.
    """

    def __init__(self) -> None:
        self.due_ms = 0
        self._reason = ""
        self._times = 0

    def failed(self, reason: str, now_ms: int) -> int:
        """An epoch failed; how often in a row for this reason. Numbers in it make no other reason of it."""
        reason = _NUMBERS.sub("#", reason)
        self._times = self._times + 1 if reason == self._reason else 1
        self._reason = reason
        self.due_ms = now_ms + min(WAIT_STEP_MS * (self._times - 1), WAIT_MS_MAX)
        return self._times

    def committed(self) -> None:
        """It gets on."""
        self.due_ms = 0
        self._reason = ""
        self._times = 0
