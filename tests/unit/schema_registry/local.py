"""A schema registry in this process, which answers as Confluent's does: over HTTP, with ids and GUIDs, which
are the same for equal schemas whatever their subjects are, and with that registry's own codes of errors.
"""

from __future__ import annotations

import base64
import json
import re
import ssl
import threading
import time
from collections.abc import Callable
from hashlib import md5
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from uuid import UUID

from confluent_kafka.schema_registry import SchemaRegistryClient

from tests.unit.schema_registry.stub import Answer, RegistryServer

AS_TEXT = 'syntax = "proto3"; message AsText {}'
"""What stands for the text of a Protobuf schema: nobody here reads it."""


class LocalRegistry(RegistryServer):
    """Use it in a `with` block. See `RegistryServer`.

    Args:
        user_info: NAME:PASSWORD that clients have to give.
        knows_guids: as registries do since 2025.
        serializes: whether Protobuf schemas are given as descriptors, if they are asked for.
        tls: a context with a certificate.

    Attributes:
        refuses: called with a subject and the text of a new schema. True: it isn't compatible.
        pause_s: how long each answer takes.
        answers_with_schemas: whether the answer to a registration has the schema, as it has if the registry
            has added something to it.
        troubles: answers that are given first, one for each request.
    """

    def __init__(
        self,
        *,
        user_info: str = "",
        knows_guids: bool = True,
        serializes: bool = True,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        super().__init__(tls=tls)
        self.refuses: Callable[[str, str], bool] = lambda _subject, _text: False
        self.pause_s = 0.0
        self.answers_with_schemas = False
        self.troubles: list[Answer] = []
        self._authorization = f"Basic {base64.b64encode(user_info.encode()).decode()}" if user_info else None
        self._knows_guids = knows_guids
        self._serializes = serializes
        self._schemas: list[dict[str, Any]] = []
        self._subjects: dict[str, list[dict[str, Any]]] = {}
        self._clients: list[SchemaRegistryClient] = []
        self._lock = threading.Lock()

    def __exit__(self, *error: object) -> None:
        for client in self._clients:
            client.close()
        super().__exit__(*error)

    def client(self) -> SchemaRegistryClient:
        """A client of another program. It is closed with the registry."""
        self._clients.append(SchemaRegistryClient({"url": self.url}))
        return self._clients[-1]

    def put(self, subject: str, kind: str, schema: Any, references: Any = ()) -> int:
        """Register a schema, as another program does, whatever it refers to. Returns its id."""
        text = schema if isinstance(schema, str) else json.dumps(schema)
        document = {"schema": text, "schemaType": kind, "references": list(references)}
        return self._register(subject, document, normalize=False)[1]["id"]

    def put_unread(self, kind: str, text: str) -> int:
        """Keep a text as a schema of no subject, whatever it is. Returns its id."""
        self._schemas.append({"schema": text, "schemaType": kind, "id": 100 + len(self._schemas)})
        return self._schemas[-1]["id"]

    def subjects(self) -> list[str]:
        """What is registered."""
        return sorted(self._subjects)

    def _answer(self, method: str, path: str, document: Any, authorization: str | None) -> Answer:
        time.sleep(self.pause_s)
        if self.troubles:
            return self.troubles.pop(0)
        if self._authorization not in (None, authorization):
            return 401, {"error_code": 401, "message": "Unauthorized"}
        parts = urlsplit(path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        with self._lock:
            return self._found(method, unquote(parts.path), query, document)

    def _found(self, method: str, path: str, query: dict[str, str], document: Any) -> Answer:
        if found := re.fullmatch(r"/schemas/ids/(\d+)", path):
            return self._schema(query, id=int(found[1]))
        if (found := re.fullmatch(r"/schemas/guids/([0-9a-f-]+)", path)) and self._knows_guids:
            return self._schema(query, guid=found[1])
        if found := re.fullmatch(r"/subjects/(.+)/versions/(\d+|latest)", path):
            versions = self._subjects.get(found[1], [])
            number = len(versions) if found[2] == "latest" else int(found[2])
            if not 0 < number <= len(versions):
                return 404, {"error_code": 40402, "message": "Version not found"}
            return 200, self._in_form(versions[number - 1], query)
        normalize = query.get("normalize") == "True"
        if found := re.fullmatch(r"/subjects/(.+)/versions", path):
            if method == "POST":
                return self._register(found[1], document, normalize=normalize)
            return 200, [one["version"] for one in self._subjects.get(found[1], [])]
        if found := re.fullmatch(r"/subjects/(.+)", path):
            if found[1] not in self._subjects:
                return 404, {"error_code": 40401, "message": f"Subject '{found[1]}' not found"}
            known = self._version(found[1], _content(document, normalize))
            return (200, known) if known else (404, {"error_code": 40403, "message": "Schema not found"})
        return 404, {"error_code": 404, "message": "HTTP 404 Not Found"}

    def _schema(self, query: dict[str, str], **wanted: Any) -> Answer:
        ((name, value),) = wanted.items()
        found = next((one for one in self._schemas if one.get(name) == value), None)
        if found is None:
            return 404, {"error_code": 40403, "message": "Schema not found"}
        return 200, self._in_form({key: part for key, part in found.items() if key != "id"}, query)

    def _in_form(self, found: dict[str, Any], query: dict[str, str]) -> dict[str, Any]:
        is_text = found.get("schemaType") == "PROTOBUF" and query.get("format") != "serialized"
        as_text = is_text or (found.get("schemaType") == "PROTOBUF" and not self._serializes)
        return {**found, "schema": AS_TEXT} if as_text else found

    def _version(self, subject: str, content: str) -> dict[str, Any] | None:
        versions = self._subjects.get(subject, [])
        return next((one for one in versions if _content(one, "sorted" in content[:6]) == content), None)

    def _register(self, subject: str, document: Any, *, normalize: bool) -> Answer:
        content = _content(document, normalize)
        known = self._version(subject, content)
        if known is None:
            if self._subjects.get(subject) and self.refuses(subject, document["schema"]):
                return 409, {"error_code": 409, "message": "READER_FIELD_MISSING_DEFAULT_VALUE: must"}
            schema = next((one for one in self._schemas if _content(one, normalize) == content), None)
            if schema is None:
                schema = {name: part for name, part in document.items() if part}
                schema["id"] = 100 + len(self._schemas)
                if self._knows_guids:
                    schema["guid"] = str(UUID(bytes=md5(content.encode()).digest()))
                if schema["schemaType"] == "AVRO":
                    del schema["schemaType"]  # it is left out
                self._schemas.append(schema)
            versions = self._subjects.setdefault(subject, [])
            known = {**schema, "subject": subject, "version": len(versions) + 1}
            versions.append(known)
        answer = self._in_form(known, {})
        if not self.answers_with_schemas:
            answer = {name: part for name, part in answer.items() if name in ("id", "guid", "version")}
        return 200, answer


def _content(document: Any, normalize: bool) -> str:
    """What is equal for equal schemas."""
    kind, text = document.get("schemaType") or "AVRO", document["schema"]
    if kind != "PROTOBUF":
        text = json.dumps(json.loads(text), sort_keys=normalize)
    return f"{'sorted' if normalize else 'as is'} {kind} {text} {document.get('references') or []}"
