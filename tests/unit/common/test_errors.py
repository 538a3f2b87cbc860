from __future__ import annotations

import copy

from fcluster.common import errors
from fcluster.common.failures import Failure, FailureKind


def test_error_with_a_remedy_shows_both_and_exits_with_a_failure() -> None:
    error = errors.MissingTopic("The topic a is missing.", remedy="Create it.")
    assert (error.message, error.remedy) == ("The topic a is missing.", "Create it.")
    assert str(error) == "The topic a is missing.\nCreate it."
    assert error.exit_code != 0


def test_error_without_a_remedy_shows_only_the_message() -> None:
    assert str(errors.StateDamaged("Gone.")) == "Gone."


def test_error_rebuilt_from_its_parts_keeps_type_message_and_remedy() -> None:
    # copy, concurrent.futures and pytest-xdist rebuild errors in this way.
    error = copy.copy(errors.SettingsError("a", remedy="b"))
    assert type(error) is errors.SettingsError
    assert (error.message, error.remedy) == ("a", "b")


def test_error_becomes_a_failure_with_its_kind_and_all_its_parts() -> None:
    error = errors.SourceGap("Records\nare gone.", remedy="Say so;\nthen go on.", where="in/0@7")
    failure = errors.failure_of(error)
    assert failure == Failure(FailureKind.SOURCE, "Records are gone.", "Say so; then go on.", "in/0@7")
    assert str(failure) == errors.one_line(error) == "Records are gone; remedy: Say so; then go on."


def test_error_without_a_remedy_is_its_message_in_one_line() -> None:
    assert errors.one_line(errors.StateDamaged("Gone.")) == "Gone."
    assert errors.one_line(ValueError("a\nb")) == "a b"
    assert errors.failure_of(OSError("full"), FailureKind.HOST) == Failure(FailureKind.HOST, "full")
