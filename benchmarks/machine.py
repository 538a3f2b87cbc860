"""On what something was measured: the machine, and the versions of all that takes part."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import confluent_kafka

from fcluster.kafka.jars import EmbeddedKafkaError, find_java, kafka_version

PACKAGES = ("fcluster", "confluent-kafka", "msgspec", "orjson", "pyzmq", "rocksdict")


def describe_machine() -> dict[str, str | int | float]:
    """Processor, cores, memory, system; how busy it was already."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "memory_mb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e6),
        "system": f"{platform.system()} {platform.release()}",
        "load_before": round(os.getloadavg()[0], 2),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")


def describe_versions() -> dict[str, str]:
    """By name. An embedded broker is of Kafka's version; brokers that were given may be of another."""
    found = {package: version(package) for package in PACKAGES}
    found |= {"Python": platform.python_version(), "librdkafka": confluent_kafka.libversion()[0]}
    found["Kafka"] = kafka_version()
    try:
        done = subprocess.run([find_java(), "--version"], capture_output=True, text=True, check=False)
        found["Java"] = done.stdout.partition("\n")[0]
    except EmbeddedKafkaError:
        pass
    return found


def commit_of(tree: Path) -> str:
    """The commit of a checkout, "" if it is none; with "+" if files differ from it."""
    command = ["git", "-C", str(tree), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
