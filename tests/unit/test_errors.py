from __future__ import annotations

import pickle

from fcluster.common import errors


def test_error_with_a_remedy_shows_both_and_exits_with_a_failure() -> None:
    error = errors.MissingTopic("The topic a is missing.", remedy="Create it.")
    assert (error.message, error.remedy) == ("The topic a is missing.", "Create it.")
    assert str(error) == "The topic a is missing.\nCreate it."
    assert error.exit_code != 0


def test_error_without_a_remedy_shows_the_message_alone() -> None:
    assert str(errors.StateDamaged("Gone.")) == "Gone."


def test_error_sent_through_pickle_keeps_type_message_and_remedy() -> None:
    # pytest-xdist and concurrent.futures move errors between processes this way.
    error = pickle.loads(pickle.dumps(errors.SettingsError("a", remedy="b")))
    assert type(error) is errors.SettingsError
    assert (error.message, error.remedy) == ("a", "b")
