"""The event loop on which a driver awaits the job's async functions. Only imported if there are some."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import cache
from typing import Any

from fcluster.engine.call_scheduler import AttemptCancelledError
from fcluster.engine.calling import Call

Outcome = tuple[Call, Any, BaseException | None]
"""What has come of an attempt: its result, or what it has raised."""


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """One for all drivers of the process: clients of services may be kept from one test to the next."""
    return asyncio.new_event_loop()


def await_calls(calls: Sequence[Call], passing: tuple[type[BaseException], ...]) -> list[Outcome]:
    """Make an attempt of each call, all at the same time. Exceptions in `passing` are raised.

    Returns:
        The outcomes, in the order in which the attempts ended.
    """
    outcomes: list[Outcome] = []

    async def together() -> None:
        await asyncio.gather(*(_attempt(call, passing, outcomes) for call in calls))

    _loop().run_until_complete(together())
    return outcomes


async def _attempt(call: Call, passing: tuple[type[BaseException], ...], outcomes: list[Outcome]) -> None:
    limit = asyncio.timeout(call.node.timeout_ms / 1000)
    try:
        async with limit:
            result: Any = await call.node.function(call.context, call.value)
    except passing:
        raise
    except asyncio.CancelledError as error:
        outcomes.append((call, None, AttemptCancelledError(error)))
    except BaseException as error:  # noqa: BLE001  whatever it is, the call has failed
        late = TimeoutError(f"no answer within {call.node.timeout_ms:,} ms")
        outcomes.append((call, None, late if limit.expired() else error))
    else:
        outcomes.append((call, result, None))
