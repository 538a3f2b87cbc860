from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fcluster.common.codecs import key_codec, value_codec
from fcluster.common.topology import KEY_KINDS, VALUE_KINDS

texts = st.text(st.characters(exclude_categories=["Cs"]))
documents = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)


@given(documents)
def test_json_document_encoded_and_decoded_stays_equal(document: Any) -> None:
    for decode, encode in (key_codec("json"), value_codec("json")):
        assert decode(encode(document)) == document


@given(texts)
def test_text_encoded_and_decoded_stays_equal(text: str) -> None:
    for decode, encode in (key_codec("text"), value_codec("text")):
        assert decode(encode(text)) == text
        assert encode(text) == text.encode("utf-8")


@given(st.binary())
def test_bytes_encoded_and_decoded_stay_equal(data: bytes) -> None:
    for decode, encode in (key_codec("bytes"), value_codec("bytes")):
        assert decode(encode(data)) == data
        assert encode(bytearray(data)) == encode(memoryview(data)) == data


@given(st.dictionaries(texts, st.integers(0, 9), min_size=2))
def test_json_keys_that_differ_in_order_only_have_equal_bytes(key: dict[str, int]) -> None:
    encode = key_codec("json")[1]
    assert encode(dict(reversed(key.items()))) == encode(key)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("text", 5),
        ("text", b"a"),
        ("text", None),
        ("bytes", "a"),
        ("bytes", 5),
        ("json", {1, 2}),
        ("json", {1: 2}),
    ],
)
def test_value_of_another_kind_is_refused(kind: Any, value: Any) -> None:
    for encode in (key_codec(kind)[1], value_codec(kind)[1]):
        with pytest.raises((TypeError, ValueError)):
            encode(value)


def test_number_as_a_text_key_tells_how_to_declare_it() -> None:
    with pytest.raises(TypeError, match=r"17 is of type int, but is written as 'text'.*'json'"):
        key_codec("text")[1](17)


@pytest.mark.parametrize(
    ("kind", "raw"), [("text", b"\xff"), ("json", b"{"), ("json", b""), ("json", b"\xff")]
)
def test_malformed_bytes_are_refused(kind: Any, raw: bytes) -> None:
    for decode in (key_codec(kind)[0], value_codec(kind)[0]):
        with pytest.raises(ValueError, match=r".+"):
            decode(raw)


def test_every_declared_kind_has_a_codec() -> None:
    assert all(key_codec(kind) for kind in KEY_KINDS)
    assert all(value_codec(kind) for kind in VALUE_KINDS)
