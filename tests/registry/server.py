"""A real schema registry for tests: Apicurio Registry, fetched by Maven, which keeps schemas in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fcluster.kafka.jars import find_java
from tests.java_server import JavaServer, fetched

_POM = Path(__file__).parent / "pom.xml"
_START_TIMEOUT_S = 300
"""It takes 20 seconds on an idle machine."""
_OPTIONS = ("-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")


class RegistryServer(JavaServer):
    """A schema registry that ends with this process. Use it in a `with` block.

    Args:
        directory: for its log.
    """

    def __init__(self, directory: Path) -> None:
        pattern = r"Listening on: http://127\.0\.0\.1:(\d+)"
        super().__init__("schema registry", directory / "registry.log", pattern, _START_TIMEOUT_S)

    def command(self) -> Sequence[str]:
        """See `JavaServer`. What is fetched takes 140 MB."""
        (jar,) = fetched(_POM, "apicurio-registry", "unpack-dependencies").glob("*-runner.jar")
        address = ("-Dquarkus.http.host=127.0.0.1", "-Dquarkus.http.port=0")
        return [str(find_java()), *_OPTIONS, *address, "-jar", str(jar)]

    @property
    def url(self) -> str:
        """For `schema.registry.url`."""
        return f"http://127.0.0.1:{self.port}/apis/ccompat/v7"
