"""A real S3 server for tests: S3Proxy, fetched by Maven, with a directory as its storage.

A bucket is a directory below `root`, and an object is a file in it, so tests can damage and age objects as in
a directory store.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from fcluster.kafka.jars import find_java
from tests.java_server import JavaServer, fetched

ACCESS_KEY = "tests"
SECRET_KEY = "not-a-secret"

_POM = Path(__file__).parent / "pom.xml"
_START_TIMEOUT_S = 60
_OPTIONS = ("-Xmx192m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")


class S3Server(JavaServer):
    """An S3 server that ends with this process. Use it in a `with` block.

    Args:
        directory: for its data, settings and log.
        address: the address that it listens on.
        prefix: a command that starts it, without forking.
    """

    def __init__(self, directory: Path, address: str = "127.0.0.1", prefix: Sequence[str] = ()) -> None:
        pattern = rf"Started \S*ServerConnector.*\{{{re.escape(address)}:(\d+)\}}"
        super().__init__("S3 server", directory / "s3proxy.log", pattern, _START_TIMEOUT_S)
        self._address = address
        self._prefix = prefix
        self.root = directory / "buckets"
        self._settings = directory / "s3proxy.conf"
        self.root.mkdir(parents=True)

    def command(self) -> Sequence[str]:
        """See `JavaServer`. What is fetched takes 55 MB."""
        (jar,) = fetched(_POM, "s3proxy", "copy-dependencies").glob("s3proxy-*.jar")
        self._settings.write_text(
            f"s3proxy.endpoint=http://{self._address}:0\n"
            "s3proxy.authorization=aws-v2-or-v4\n"
            f"s3proxy.identity={ACCESS_KEY}\n"
            f"s3proxy.credential={SECRET_KEY}\n"
            "jclouds.provider=filesystem-nio2\n"
            f"jclouds.filesystem.basedir={self.root}\n"
        )
        java = [*self._prefix, str(find_java()), *_OPTIONS]
        return [*java, "-jar", str(jar), "--properties", str(self._settings)]

    def make_bucket(self, name: str) -> Path:
        """Create a bucket. Returns its directory."""
        path = self.root / name
        path.mkdir()
        return path

    def environment(self) -> dict[str, str]:
        """Variables for the environment of a client."""
        return {
            "AWS_ENDPOINT_URL": f"http://{self._address}:{self.port}",
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": "us-east-1",
        }
