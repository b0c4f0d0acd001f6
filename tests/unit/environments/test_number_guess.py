from __future__ import annotations

import pytest

from rljob_runtime.environments.number_guess import NumberGuess, NumberGuessParameters


def play_binary_search(environment: NumberGuess, numbers: int) -> tuple[list[str], float]:
    low, high, replies = 0, numbers - 1, []
    environment.reset()
    while True:
        guess = (low + high) // 2
        result = environment.step(str(guess))
        if result.done:
            return replies, environment.end().reward
        replies.append(result.observation)
        if result.observation == "<":
            high = guess - 1
        elif result.observation == ">":
            low = guess + 1
        else:
            assert result.observation == "=" and result.reward == 1.0
            low, high = 0, numbers - 1


def test_binary_search_wins_because_the_replies_follow_the_guesses() -> None:
    rewards = [play_binary_search(NumberGuess(NumberGuessParameters(numbers=8, turns=40), s), 8)[1] for s in range(20)]
    assert sum(rewards) / 20 == pytest.approx(1 / 2.625, abs=0.05)  # mean depth of binary search over 8 numbers


def test_the_observation_depends_on_the_action() -> None:
    parameters = NumberGuessParameters(numbers=10, turns=2)
    replies = set()
    for guess in range(10):
        environment = NumberGuess(parameters, seed=1)
        environment.reset()
        replies.add(environment.step(str(guess)).observation)
    assert replies == {"<", ">", "="} or replies in ({"<", "="}, {">", "="})


@pytest.mark.parametrize("answer", ["", "x", "10", "-1", "²", "9" * 5000])
def test_what_is_no_number_in_range_scores_zero_and_is_told_so(answer: str) -> None:
    environment = NumberGuess(NumberGuessParameters(), seed=1)
    environment.reset()
    result = environment.step(answer)
    assert (result.reward, result.observation) == (0.0, "?")


def test_words_are_for_chat_models() -> None:
    environment = NumberGuess(NumberGuessParameters(replies="words", turns=2), seed=1)
    assert "from 0 to 9" in environment.reset()[0].content
    assert environment.step("ten").observation == "Answer with one number in the range."


def test_the_constant_baseline_is_what_playing_a_constant_scores() -> None:
    parameters = NumberGuessParameters(numbers=2, turns=3)
    scores = []
    for seed in range(4000):
        environment = NumberGuess(parameters, seed)
        environment.reset()
        for _ in range(3):
            environment.step("1")
        scores.append(environment.end().reward)
    expected = (1 / 2 + 1 / 4 + 1 / 8) / 3
    assert environment.end().info["constantBaseline"] == pytest.approx(expected, abs=1e-12)
    assert sum(scores) / len(scores) == pytest.approx(expected, abs=0.02)
