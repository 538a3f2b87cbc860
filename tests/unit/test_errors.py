from __future__ import annotations

import copy

from fcluster.common import errors


def test_error_with_a_remedy_shows_both_and_exits_with_a_failure() -> None:
    error = errors.MissingTopic("The topic a is missing.", remedy="Create it.")
    assert (error.message, error.remedy) == ("The topic a is missing.", "Create it.")
    assert str(error) == "The topic a is missing.\nCreate it."
    assert error.exit_code != 0


def test_error_without_a_remedy_shows_the_message_alone() -> None:
    assert str(errors.StateDamaged("Gone.")) == "Gone."


def test_error_rebuilt_from_its_parts_keeps_type_message_and_remedy() -> None:
    # copy, concurrent.futures and pytest-xdist rebuild errors this way.
    error = copy.copy(errors.SettingsError("a", remedy="b"))
    assert type(error) is errors.SettingsError
    assert (error.message, error.remedy) == ("a", "b")


def test_one_line_of_an_error_can_be_taken_apart_again() -> None:
    line = errors.one_line(errors.SourceGap("Records\nare gone.", remedy="Say so;\nthen go on."))
    assert line == "Records are gone; remedy: Say so; then go on."
    assert errors.cause_and_remedy(line) == ("Records are gone", "Say so; then go on.")


def test_one_line_of_an_error_without_a_remedy_is_its_message() -> None:
    assert errors.one_line(errors.StateDamaged("Gone.")) == "Gone."
    assert errors.one_line(ValueError("a\nb")) == "a b"
    assert errors.cause_and_remedy("Gone.") == ("Gone.", "")
