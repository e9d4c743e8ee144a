"""The replay table: whole, and what training gives."""

import pytest

from paperback.errors import DataError
from paperback.search.replay import STEPS, replay_score, replay_scores, replay_space, train_model


def test_every_model_is_in_the_table():
    scores = [replay_score(walk.config) for walk in replay_space().enumerate()]
    assert len(scores) == 576
    assert sorted(scores) == sorted(replay_scores())
    assert max(scores) > 0.95


def test_training_a_model_gives_its_row():
    """To within a few images of 360: sums of floats differ between machines."""
    config = next(walk.config for walk in replay_space().enumerate() if replay_score(walk.config) > 0.9)
    trained = train_model(config)
    for steps, accuracy in zip(STEPS, trained, strict=True):
        assert accuracy == pytest.approx(replay_score(config, steps), abs=0.03)


def test_what_is_not_in_the_table_is_said():
    config = next(replay_space().enumerate()).config
    with pytest.raises(DataError, match="steps is 7"):
        replay_score(config, 7)
    with pytest.raises(DataError, match="no model of the replay space"):
        replay_score(config | {"lr": 5})
