"""Entries of a state that has changed: each is migrated once, when a handler first meets it.

Responsible for: telling which version an entry is of, turning an old one into one of the present version, and
writing it back. An entry that was migrated counts as changed by the record that met it: it is in the delta of
that epoch, undone with the record, and lost with an uncommitted epoch. So an entry is committed in its new
form exactly once, whatever crashes or moves in between. Entries that no record meets stay as they are, in
snapshots and changelogs too. Pure.

An entry of version 1 is marked as in `entries`, so state from before there were versions is of version 1. The
documents of `ctx.state` (`state.StateTable`) are plain JSON in version 1, and like entries without a TTL
later.

    2 | version (2 bytes) | value                          without TTL
    3 | time (8 bytes) | version (2 bytes) | value         with TTL
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

from fcluster.common.failures import bounded_repr, describe_exception, place_of, type_of
from fcluster.engine.entries import ABSENT, DELETED, TIMED, VALUE_AT, EntryTable
from fcluster.engine.ordered_keys import decode_time
from fcluster.engine.steps import RecordError
from fcluster.engine.values import encode_values
from fcluster.graph.codecs import Decode, Kind, ModelCodec, value_codec
from fcluster.graph.models import is_model, model_codec
from fcluster.graph.states import Migration
from fcluster.graph.typed import holds_typed

PLAIN_VERSIONED = b"\x02"
TIMED_VERSIONED = b"\x03"
VERSION_BYTES = 2


class Migrations:
    """What the entries of one state need to become those of its present version.

    Args:
        title: of the state, for messages.
        version: the present version.
        steps: the migrations, by former version.
        decoder_of: gives what decodes values of a kind.
        kind: how entries of the present version are encoded.
    """

    def __init__(
        self,
        title: str,
        version: int,
        steps: Mapping[int, Migration],
        decoder_of: Callable[[Kind], Decode],
        kind: Kind,
    ) -> None:
        self.version = version
        self._model = kind.model if isinstance(kind, ModelCodec) else None
        self._title = title
        self._steps = steps
        self._decoders: Mapping[int, Decode] = {
            former: decoder_of(step.value) for former, step in steps.items()
        }

    def migrated(self, former: int, raw: bytes) -> Any:
        """The value of the present version, from the bytes of one of a former version.

        Raises:
            RecordError: the state doesn't say how, a function fails, or it returns what isn't of its version.
        """
        decode = self._decoders.get(former)
        if decode is None:
            raise RecordError(
                f"the state {self._title!r} has an entry of version {former}, and its migrate= doesn't say "
                f"how that becomes one of version {self.version}"
            )
        at = former
        try:
            value = self._steps[at].function(decode(raw))
            for following in range(former + 1, self.version):
                # As if it had been stored: the next function gets the same, whatever version it begins with.
                stored = _encoded(self._steps[following].value, value)
                at = following
                value = self._steps[at].function(self._decoders[at](stored))
        except Exception as error:
            where = place_of(error)
            raise RecordError(
                f"migrate[{at}] of the state {self._title!r} failed: {describe_exception(error)}"
                + (f" ({where})" if where else "")
            ) from error
        if self._model is not None and type(value) is not self._model:
            raise RecordError(
                f"migrate[{at}] of the state {self._title!r} returned {bounded_repr(value)}, a "
                f"{type_of(value)}, but {self._model.__name__} is declared"
            )
        return value


def _encoded(kind: Kind, value: Any) -> bytes:
    """What a function of a migration returned, as an entry of that version."""
    model = cast("type[Any]", type(value))
    if kind == "json" and is_model(model):
        kind = model_codec(model)
    if kind == "json" and holds_typed(value):
        return encode_values([value])[0]
    return value_codec(kind)[1](value)


class MigratingTable(EntryTable):
    """An `EntryTable` whose store may have entries of former versions."""

    __slots__ = ("_migrations", "mark", "timed_mark", "version")

    def migrate_with(self, migrations: Migrations) -> None:
        """Say how. Call it once, before anything else."""
        self._migrations = migrations
        version = migrations.version.to_bytes(VERSION_BYTES, "big")
        self.mark, self.timed_mark, self.version = PLAIN_VERSIONED + version, TIMED_VERSIONED, version

    def get(self, key: bytes) -> Any:
        """See `EntryTable`. An entry of a former version becomes one of the present version."""
        if self._ttl is not None and key not in self._open and key not in self._clean:
            raw = self._layers.read(self.prefix + key)
            if raw and self._is_former(raw) and self._ttl.is_over(decode_time(raw[1:VALUE_AT])):
                return ABSENT  # expired, so nobody needs it
        value = super().get(key)
        if key not in self._open and value is not ABSENT and self._is_former(self._below.get(key)):
            self._replace(key, value)
        return value

    def load_many(self, keys: Collection[bytes]) -> None:
        """See `EntryTable`. Former entries aren't loaded: whoever meets one migrates it, and no other."""
        cold = [key for key in keys if key not in self._open and key not in self._clean]
        if cold:
            prefix = self.prefix
            found = self._layers.read_many([prefix + key for key in cold])
            for key, raw in zip(cold, found, strict=True):
                if not self._is_former(raw):
                    self._clean[key] = self._take(key, raw)

    def time_of(self, key: bytes) -> int | None:
        """See `EntryTable`."""
        if key not in self._open and key not in self._clean:
            raw = self._layers.read(self.prefix + key)
            return decode_time(raw[1:VALUE_AT]) if raw else None
        return super().time_of(key)

    def _get_stored(self, key: bytes, stored: bytes) -> Any:
        return self.get(key) if self._is_former(stored) else super()._get_stored(key, stored)

    def _is_former(self, raw: bytes | None) -> bool:
        return bool(raw) and _version_of(raw)[0] != self._migrations.version

    def _take(self, key: bytes, raw: bytes | None) -> Any:
        if not raw:
            self._below[key] = DELETED
            return ABSENT
        version, value_at = _version_of(raw)
        if raw[:1] in (TIMED, TIMED_VERSIONED):
            self._times[key] = decode_time(raw[1:VALUE_AT])
        if version == self._migrations.version:
            value = self._codec.decode(raw[value_at:])
        else:
            value = self._migrations.migrated(version, raw[value_at:])
        self._below[key] = raw
        return value


def _version_of(raw: bytes) -> tuple[int, int]:
    """The version of an encoded entry, and where its value begins."""
    mark = raw[:1]
    at = VALUE_AT if mark in (TIMED, TIMED_VERSIONED) else 1
    if mark not in (PLAIN_VERSIONED, TIMED_VERSIONED):
        return 1, at
    return int.from_bytes(raw[at : at + VERSION_BYTES], "big"), at + VERSION_BYTES
