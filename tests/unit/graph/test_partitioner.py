"""The partitioner chooses the same partitions as Kafka's clients."""

from __future__ import annotations

import confluent_kafka
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fcluster.graph.partitioner import murmur2, partition_of


@pytest.mark.parametrize(
    ("data", "hashed"),
    [
        # From Kafka's own tests of Utils.murmur2.
        (b"21", -973932308),
        (b"foobar", -790332482),
        (b"a-little-bit-long-string", -985981536),
        (b"a-little-bit-longer-string", -1486304829),
        (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
        (b"abc", 479470107),
    ],
)
def test_hash_equals_that_of_javas_clients(data: bytes, hashed: int) -> None:
    assert murmur2(data) == hashed % 2**32


@given(st.binary(max_size=100), st.integers(1, 1000))
def test_partition_equals_that_of_the_client_library(key: bytes, partitions: int) -> None:
    assert partition_of(key, partitions) == confluent_kafka.murmur2(key, partitions)  # type: ignore[attr-defined]
