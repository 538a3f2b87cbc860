"""A real broker that requires TLS and a login, and checks ACLs. Its certificates are created when it
starts.

Responsible for: two authorities (one that signed the broker's certificate, and one that didn't), the broker's
settings, its users and their permissions. Its listener on loopback without TLS and login is the
administrator's: a client that uses it may do anything.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)

from fcluster.kafka.embedded import EmbeddedKafka
from fcluster.kafka.ports import reserve_for_process

Rule = tuple[ResourceType, str, bool, Sequence[AclOperation]]
_KEYSTORE_PASSWORD = "of-the-test"
_SCRAM = "org.apache.kafka.common.security.scram.ScramLoginModule required;"


class SecuredKafka:
    """See the module's docstring. Use it in a `with` block.

    Attributes:
        servers: the listener with TLS and login.
        admin_servers: the administrator's listener.
        authority: the certificate of the authority that signed the broker's.
        stranger: the certificate of an unrelated authority.
    """

    def __init__(self, directory: Path, plain_users: Mapping[str, str] | None = None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.authority = make_authority(directory, "authority")
        self.stranger = make_authority(directory, "stranger")
        self._keystore = make_keystore(directory, self.authority)
        self._plain_users = dict(plain_users or {})
        self._broker = EmbeddedKafka(directory / "kafka", adapt=self._adapt)
        self.servers = f"127.0.0.1:{reserve_for_process()}"
        self.admin_servers = ""

    def __enter__(self) -> SecuredKafka:
        self.admin_servers = self._broker.start()
        self.admin = AdminClient({"bootstrap.servers": self.admin_servers})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._broker.stop()

    def add_user(self, name: str, password: str) -> None:
        """Add a user who logs in with SCRAM-SHA-512."""
        credentials = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096)
        change = UserScramCredentialUpsertion(name, credentials, password.encode())
        self.admin.alter_user_scram_credentials([change])[name].result(30)

    def allow(
        self, user: str, rules: Sequence[tuple[ResourceType, str, bool, Sequence[AclOperation]]]
    ) -> None:
        """Give a user permissions: resource type, name, whether it is a prefix of names, and operations."""
        bindings = [
            AclBinding(
                kind,
                name,
                ResourcePatternType.PREFIXED if is_prefix else ResourcePatternType.LITERAL,
                f"User:{user}",
                "*",
                operation,
                AclPermissionType.ALLOW,
            )
            for kind, name, is_prefix, operations in rules
            for operation in operations
        ]
        for future in self.admin.create_acls(bindings).values():
            future.result(30)

    def _adapt(self, ours: dict[str, str]) -> dict[str, str]:
        users = "".join(f' user_{name}="{password}"' for name, password in self._plain_users.items())
        plain = f"org.apache.kafka.common.security.plain.PlainLoginModule required{users};"
        return {
            **ours,
            "listeners": f"{ours['listeners']},SASL_SSL://{self.servers}",
            "advertised.listeners": f"{ours['advertised.listeners']},SASL_SSL://{self.servers}",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SASL_SSL:SASL_SSL",
            "inter.broker.listener.name": "PLAINTEXT",
            "sasl.enabled.mechanisms": "SCRAM-SHA-512,PLAIN",
            "listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config": _SCRAM,
            "listener.name.sasl_ssl.plain.sasl.jaas.config": plain,
            "ssl.keystore.type": "PKCS12",
            "ssl.keystore.location": str(self._keystore),
            "ssl.keystore.password": _KEYSTORE_PASSWORD,
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": "User:ANONYMOUS",
        }


def make_authority(directory: Path, name: str) -> Path:
    """Create the certificate of a new authority, with its key next to it."""
    certificate = directory / f"{name}.pem"
    subject = ("-subj", f"/CN={name}", "-keyout", str(certificate.with_suffix(".key")))
    _openssl("req", "-x509", *_NEW_KEY, *subject, "-out", str(certificate), "-days", "30")
    return certificate


def make_keystore(directory: Path, authority: Path) -> Path:
    """Create a Java key store with a certificate for 127.0.0.1, signed by `authority`."""
    key, request, certificate = (directory / f"broker.{suffix}" for suffix in ("key", "csr", "pem"))
    _openssl("req", *_NEW_KEY, "-subj", "/CN=broker", "-keyout", str(key), "-out", str(request))
    names = directory / "names"
    names.write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
    signer = ("-CA", str(authority), "-CAkey", str(authority.with_suffix(".key")), "-CAcreateserial")
    signed = ("-out", str(certificate), "-days", "30", "-extfile", str(names))
    _openssl("x509", "-req", "-in", str(request), *signer, *signed)
    keystore = directory / "broker.p12"
    made_of = ("-in", str(certificate), "-inkey", str(key), "-certfile", str(authority))
    _openssl("pkcs12", "-export", *made_of, "-out", str(keystore), "-passout", f"pass:{_KEYSTORE_PASSWORD}")
    return keystore


_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-sha256")


def _openssl(*arguments: str) -> None:
    program = shutil.which("openssl")
    assert program is not None, "the certificates of the test's broker are made by openssl: not on the PATH"
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"openssl {' '.join(arguments)}: {done.stderr}"
