from __future__ import annotations

import itertools
from statistics import fmean

import pytest

from rljob_runtime.environments.base import Message
from rljob_runtime.environments.digits import DigitParameters, Digits, DigitTask, constant_baseline


def questions(task: DigitTask, parameters: DigitParameters, seed: int) -> list[str]:
    environment = Digits(task, parameters, seed)
    shown = [environment.reset()[0].content]
    while not (result := environment.step("")).done:
        shown.append(result.observation)
    return shown


def solve(task: DigitTask, question: str) -> str:
    digits = question.removesuffix("=")
    return {"digit-copy": digits, "digit-sort": "".join(sorted(digits)), "digit-reverse": digits[::-1]}[task.value]


@pytest.mark.parametrize("task", list(DigitTask))
def test_right_answers_score_one_a_turn_and_one_an_episode(task: DigitTask) -> None:
    parameters = DigitParameters(digits=4, turns=3)
    shown = questions(task, parameters, seed=5)
    environment = Digits(task, parameters, 5)
    environment.reset()
    results = [environment.step(solve(task, question)) for question in shown]
    assert [result.reward for result in results] == [1.0, 1.0, 1.0]
    assert [result.done for result in results] == [False, False, True]
    assert environment.end().reward == 1.0


def test_the_prompt_is_the_digits_and_an_equals_sign() -> None:
    (message,) = Digits(DigitTask.COPY, DigitParameters(digits=3, turns=1, base=2), 0).reset()
    assert message.role == "user"
    assert len(message.content) == 4 and message.content[3] == "=" and set(message.content[:3]) <= {"0", "1"}


def test_one_seed_gives_one_task_and_another_seed_another() -> None:
    parameters = DigitParameters()
    first = questions(DigitTask.SORT, parameters, 11)
    assert first == questions(DigitTask.SORT, parameters, 11)
    assert first != questions(DigitTask.SORT, parameters, 12)


def test_an_answer_is_scored_position_by_position() -> None:
    environment = Digits(DigitTask.COPY, DigitParameters(digits=4, turns=4), 3)
    question = environment.reset()[0].content
    wrong = str((int(question[0]) + 1) % 10)
    result = environment.step(wrong + question[1:4])
    assert result.reward == 0.75
    second = result.observation
    assert environment.step(second[:2]).reward == 0.5
    third = environment.step("").observation
    assert environment.step(third[:4] + "999").reward in {0.0, 0.25, 0.5, 0.75, 1.0}
    assert environment.end().reward == fmean([0.75, 0.5, 0.0, environment._rewards[3]])


def test_a_truncated_episode_is_scored_on_the_turns_it_has() -> None:
    environment = Digits(DigitTask.COPY, DigitParameters(turns=5), 3)
    assert environment.end().reward == 0.0
    question = environment.reset()[0].content
    environment.step(question)
    assert environment.end().reward == 1.0


def test_the_constant_baseline_is_what_enumeration_of_all_questions_finds() -> None:
    base, k = 4, 3
    parameters = DigitParameters(digits=k, base=base)
    for task in DigitTask:
        rights = [solve(task, "".join(map(str, digits))) for digits in itertools.product(range(base), repeat=k)]
        best = max(
            fmean(sum(a == b for a, b in zip(answer, right, strict=True)) / k for right in rights)
            for answer in map("".join, itertools.product("0123", repeat=k))
        )
        assert constant_baseline(task, parameters) == pytest.approx(best, abs=1e-12)


def test_the_baseline_of_copy_in_base_ten_is_a_tenth_and_reported() -> None:
    environment = Digits(DigitTask.COPY, DigitParameters(), 0)
    assert environment.end().info == {"constantBaseline": 0.1}


def test_messages_are_values() -> None:
    assert Message("user", "1=") == Message("user", "1=")
