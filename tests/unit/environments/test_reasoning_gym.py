from __future__ import annotations

import pytest

from rljob_api.errors import EnvironmentFailure
from rljob_runtime.environments.factory import make_environment
from rljob_runtime.environments.reasoning_gym_adapter import (
    ReasoningGym,
    ReasoningGymParameters,
    constant_baseline,
    extract,
)

pytest.importorskip("reasoning_gym")

SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def total(question: str) -> str:
    return str(eval(question.split(":")[1].split("=")[0]))


def test_the_right_number_in_prose_scores_one() -> None:
    environment = ReasoningGym(ReasoningGymParameters(dataset="chain_sum", config=SUMS, extract="last-number"), seed=4)
    question = environment.reset()[0].content
    result = environment.step(f"The sum of the two is {total(question)}.")
    assert result.reward == 1.0 and result.done
    assert environment.end().reward == 1.0


def test_a_wrong_number_scores_less() -> None:
    environment = ReasoningGym(ReasoningGymParameters(dataset="chain_sum", config=SUMS, extract="last-number"), seed=4)
    environment.reset()
    assert environment.step("77").reward < 0.1


def test_the_seed_gives_the_item() -> None:
    parameters = {"dataset": "chain_sum", "config": SUMS}
    shown = {seed: make_environment("reasoning-gym", parameters, seed).reset()[0].content for seed in range(6)}
    assert shown[3] == make_environment("reasoning-gym", parameters, 3).reset()[0].content
    assert len(set(shown.values())) > 3


def test_a_size_bounds_the_number_of_distinct_items() -> None:
    parameters = {"dataset": "chain_sum", "size": 2}
    shown = {make_environment("reasoning-gym", parameters, seed).reset()[0].content for seed in range(10)}
    assert len(shown) == 2


def test_a_few_shot_prompt_shows_solved_items_as_earlier_turns() -> None:
    parameters = ReasoningGymParameters(dataset="chain_sum", config=SUMS, prompt="few-shot", shots=2)
    messages = ReasoningGym(parameters, seed=4).reset()
    assert [message.role for message in messages] == ["user", "assistant", "user", "assistant", "user"]
    assert messages[1].content == total(messages[0].content)


def test_a_scorer_that_raises_on_what_the_model_wrote_scores_zero() -> None:
    environment = ReasoningGym(ReasoningGymParameters(dataset="prime_factorization"), seed=1)
    environment.reset()
    assert environment.step("two times three").reward == 0.0  # int() raises inside the verifier


def test_a_step_before_reset_is_an_environment_failure() -> None:
    with pytest.raises(EnvironmentFailure, match="step before reset"):
        ReasoningGym(ReasoningGymParameters(dataset="chain_sum"), seed=1).step("1")


def test_the_constant_baseline_is_the_share_of_the_commonest_answer() -> None:
    baseline = constant_baseline(ReasoningGymParameters(dataset="count_bits", config={"max_n": 1, "min_n": 1}))
    assert baseline == 1.0  # one question only: a constant answers all of it
    spread = constant_baseline(ReasoningGymParameters(dataset="chain_sum", config=SUMS))
    assert 0.05 < spread < 0.35


@pytest.mark.parametrize(
    ("answer", "how", "expected"),
    [
        ("It is 3 + 4 = 7.", "last-number", "7"),
        ("-2.5 or -3", "last-number", "-3"),
        (" none ", "last-number", "none"),
        (" It is 7. ", "text", "It is 7."),
    ],
)
def test_extraction(answer: str, how: str, expected: str) -> None:
    assert extract(answer, how) == expected  # type: ignore[arg-type]
