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
