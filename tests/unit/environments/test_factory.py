from __future__ import annotations

import subprocess
import sys

import pytest

from rljob_api.errors import SpecError
from rljob_runtime.environments.factory import ENVIRONMENT_NAMES, check_environment, make_environment

PARAMETERS: dict[str, dict[str, object]] = {"reasoning-gym": {"dataset": "chain_sum"}}


@pytest.mark.parametrize("name", ENVIRONMENT_NAMES)
def test_every_environment_is_made_with_its_defaults_and_plays_a_turn(name: str) -> None:
    assert check_environment(name, PARAMETERS.get(name, {})) == ()
    environment = make_environment(name, PARAMETERS.get(name, {}), seed=3)
    assert environment.reset()
    assert 0 <= environment.step("1").reward <= 1
    assert "constantBaseline" in environment.end().info


def only(name: str, parameters: dict[str, object]) -> str:
    (violation,) = check_environment(name, parameters)  # type: ignore[arg-type]
    return str(violation)


def test_an_unknown_name_is_refused_with_the_nearest_one() -> None:
    assert only("digit-copi", {}) == (
        "spec.environment.name: no environment of that name (got digit-copi). Did you mean `digit-copy`?"
    )
    assert "Use one of: digit-copy, digit-reverse" in only("zzz", {})
    with pytest.raises(SpecError, match="no environment of that name"):
        make_environment("zzz", {}, 0)


def test_an_unknown_parameter_is_refused_with_the_nearest_one() -> None:
    assert only("digit-copy", {"digit": 4}) == (
        "spec.environment.parameters.digit: unknown parameter of this environment. Did you mean `digits`?"
    )


@pytest.mark.parametrize(
    ("name", "parameters", "path"),
    [
        ("digit-copy", {"digits": "4"}, "spec.environment.parameters.digits"),
        ("digit-copy", {"turns": 0}, "spec.environment.parameters.turns"),
        ("digit-sort", {"base": 11}, "spec.environment.parameters.base"),
        ("number-guess", {"replies": "emoji"}, "spec.environment.parameters.replies"),
        ("reasoning-gym", {}, "spec.environment.parameters.dataset"),
        ("reasoning-gym", {"dataset": "chain_sun"}, "spec.environment.parameters.dataset"),
        ("reasoning-gym", {"dataset": "chain_sum", "config": {"terms": 2}}, "spec.environment.parameters.config"),
        (
            "reasoning-gym",
            {"dataset": "chain_sum", "config": {"min_terms": 9, "max_terms": 2}},
            "spec.environment.parameters.config",
        ),
        ("reasoning-gym", {"dataset": "chain_sum", "config": {"seed": 2}}, "spec.environment.parameters.config.seed"),
    ],
)
def test_an_ill_typed_parameter_is_refused_where_it_is(name: str, parameters: dict[str, object], path: str) -> None:
    assert only(name, parameters).startswith(path + ": ")


def test_all_wrong_parameters_are_named_at_once() -> None:
    assert len(check_environment("digit-copy", {"digits": 0, "turns": "x", "colour": 1})) == 3


def test_without_reasoning_gym_the_extra_is_named() -> None:
    script = (
        "import sys; sys.modules['reasoning_gym'] = None\n"
        "from rljob_runtime.environments.factory import check_environment\n"
        "(v,) = check_environment('reasoning-gym', {'dataset': 'chain_sum'}); print(v)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert "rljob[reasoning-gym]" in done.stdout, done.stderr


def test_making_a_built_in_environment_imports_no_heavy_library() -> None:
    script = (
        "import sys\nfrom rljob_runtime.environments.factory import make_environment\n"
        "make_environment('digit-copy', {}, 0)\n"
        "print(sorted({'torch', 'vllm', 'transformers', 'reasoning_gym'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "[]", done.stderr
