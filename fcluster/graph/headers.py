"""`Header`: a header of records that has a kind, like a key or a value.

Responsible for: its checks, its value in a record, and the pair of a name and bytes that a `Record` takes.
Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from fcluster.common.errors import JobError
from fcluster.common.failures import bounded_repr, describe_exception
from fcluster.graph.codecs import Codec, Kind, ModelError, decode_value, kind_title, value_codec
from fcluster.graph.models import declared_kind

_V = TypeVar("_V")


@dataclass(frozen=True, slots=True)
class Header(Generic[_V]):
    """A header of a name and a kind.

    Example::

        ATTEMPT: Header[int] = Header("attempt", "int")

        @job.process(orders, to=orders_again)
        def again(ctx, order):
            attempt = ctx.header(ATTEMPT, 0) + 1
            return Record(value=order, headers=ATTEMPT.set_in(ctx.headers, attempt))

    Attributes:
        name: of the header.
        kind: how its value is encoded: "text" (the default), "bytes", "int", "json", "msgpack", a `Codec`, or
            a model (a dataclass, a Struct or a pydantic model).

    Raises:
        JobError: the name or the kind isn't valid.
    """

    name: str
    kind: Kind | type[Any] = "text"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:  # pyright: ignore[reportUnnecessaryIsInstance]  a user's
            raise JobError(
                f"The header name {bounded_repr(self.name)} isn't text.", remedy="Use Header('trace')."
            )
        kind = declared_kind(self.kind, "kind", f" of the header {self.name!r}")
        if isinstance(kind, Codec) and kind.open is not None:
            raise JobError(
                f"kind={kind.name!r} of the header {self.name!r} depends on a topic or on settings.",
                remedy="Use a codec that doesn't: headers belong to records of all topics.",
            )
        object.__setattr__(self, "kind", kind)

    def read_from(self, headers: Iterable[tuple[str, bytes | None]]) -> _V | None:
        """Its value in these headers: that of the last one of its name. None if there is none, or if it is
        null.

        Raises:
            ModelError: its bytes aren't of its kind.
        """
        raw: bytes | None = None
        for name, value in headers:
            if name == self.name:
                raw = value
        if raw is None:
            return None
        kind = cast("Kind", self.kind)
        try:
            return decode_value(kind, raw)
        except Exception as error:
            text = str(error) if isinstance(error, ModelError) else describe_exception(error)
            raise ModelError(
                f"its header {self.name!r}, {bounded_repr(raw)}, can't be decoded as {kind_title(kind)}: "
                f"{text}"
            ) from error

    def pair(self, value: _V) -> tuple[str, bytes]:
        """The header with this value, for `Record(headers=[...])`.

        Raises:
            TypeError, ValueError: the value isn't of its kind.
        """
        return self.name, value_codec(cast("Kind", self.kind))[1](value)

    def set_in(
        self, headers: Iterable[tuple[str, bytes | None]], value: _V
    ) -> list[tuple[str, bytes | None]]:
        """These headers, with this value in place of those that have its name."""
        return [*((name, raw) for name, raw in headers if name != self.name), self.pair(value)]
