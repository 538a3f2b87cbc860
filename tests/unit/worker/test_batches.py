"""A producer's batches become as small as needed for a topic that refused one because of its size."""

from __future__ import annotations

import pytest
from confluent_kafka import KafkaError

from fcluster.common.settings import Settings
from fcluster.worker.batches import BATCH_BYTES, SHRINKING, Batches

LIMITS = {"small": 20_000, "tiny": 500, "large": 10_000_000}


def batches(**kafka: str) -> Batches:
    return Batches(
        Settings(kafka={name.replace("_", "."): value for name, value in kafka.items()}), LIMITS.get
    )


def test_nothing_is_changed_before_a_topic_refuses_something() -> None:
    assert batches().producer_config() == {}


@pytest.mark.parametrize("code", [KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.RECORD_LIST_TOO_LARGE])
def test_batches_fit_into_every_topic_that_has_refused_one(code: int) -> None:
    bound = batches()
    bound.refused("small", code)
    assert bound.producer_config() == {"batch.size": 20_000}
    bound.refused("tiny", code)
    bound.refused("large", code)
    assert bound.producer_config() == {"batch.size": 500}
    assert bound.producer_config() == {"batch.size": 500}, "for the worker's whole lifetime"


@pytest.mark.parametrize(
    ("topic", "code"), [("small", KafkaError.INVALID_RECORD), ("", KafkaError.MSG_SIZE_TOO_LARGE)]
)
def test_other_refusals_do_not_change_batches(topic: str, code: int) -> None:
    bound = batches()
    bound.refused(topic, code)
    assert bound.producer_config() == {}


def test_batches_shrink_with_each_refusal_of_a_topic_whose_limit_is_unknown() -> None:
    bound = batches()
    sizes: list[int] = []
    for _ in range(8):
        bound.refused("hidden", KafkaError.MSG_SIZE_TOO_LARGE)
        sizes.append(bound.producer_config()["batch.size"])
    assert sizes[0] == BATCH_BYTES // SHRINKING
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 1, "one record a batch"


@pytest.mark.parametrize("name", ["batch_size", "producer_batch_size"])
def test_users_own_batches_do_not_become_larger(name: str) -> None:
    bound = batches(**{name: "10000"})
    bound.refused("small", KafkaError.MSG_SIZE_TOO_LARGE)
    assert bound.producer_config() == {"batch.size": 10_000}
