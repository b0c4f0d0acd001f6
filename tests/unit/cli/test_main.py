"""The command line: options are frozen, imports light, errors a sentence and an exit code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rljob.main import main
from rljob_api.errors import BadInput

ROOT = Path(__file__).parents[3]
OPTIONS = {
    "": ["--debug", "--help", "--version"],
    "run": [
        "--help",
        "--nats-port",
        "--no-record",
        "--plain",
        "--record-bytes",
        "--resume",
        "--run-dir",
        "--set",
    ],
    "validate": ["--cluster", "--help"],
    "crd": ["--help"],
    "verify": ["--help", "--tokens"],
    "report": ["--help", "--output"],
    "trainer": ["--help"],
    "operator": ["--help"],
    "rollout": ["--help"],
    "old-policy": ["--help"],
}
"""Frozen: a name that is taken away or renamed breaks scripts."""
EXIT_WENT_ON = 9


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"] if command else ["--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", OPTIONS)
def test_the_options_of_a_command_are_frozen(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    named = re.findall(r"^\s+(?:-\w, )?(--[a-z-]+)", help_of(command, capsys), re.MULTILINE)
    assert sorted(named) == OPTIONS[command]


def test_the_commands_and_exit_codes_are_named_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of("", capsys)
    assert re.findall(r"^    ([\w-]+)\s", text, re.MULTILINE) == [command for command in OPTIONS if command]
    assert "0 done, 1 the run or the check failed, 2 bad input, 130 interrupted" in " ".join(text.split())


def test_the_command_line_itself_imports_nothing_heavy() -> None:
    code = (
        "import sys, rljob.main\n"
        "heavy = ('torch', 'numpy', 'nats', 'matplotlib', 'rich', 'vllm', 'transformers', 'yaml')\n"
        "print(*(name for name in heavy if name in sys.modules))"
    )
    folders = [str(ROOT / folder) for folder in ("api", "protocol", "operator", "runtime", "cli")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_a_missing_run_is_bad_input_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path / "none")]) == 2
    said = capsys.readouterr().err
    assert said == f"rljob: error: {tmp_path / 'none'} is not the folder of a run: it has no readable run.json\n"


def test_debug_shows_where_an_error_came_from(tmp_path: Path) -> None:
    with pytest.raises(BadInput):
        main(["--debug", "verify", str(tmp_path / "none")])


def test_a_refused_job_names_every_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "job.yaml").write_text("kind: RLJob\n")
    assert main(["run", str(tmp_path / "job.yaml")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("rljob: the RLJob is refused, ")
    assert "  metadata: is required" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run"], "give either a FILE or --resume RUN"),
        (["run", "job.yaml", "--resume", "runs/x"], "give either a FILE or --resume RUN"),
        (["run", "--resume", "runs/x", "--set", "spec.training.steps=3"], "leave out --set and --run-dir"),
    ],
)
def test_arguments_that_contradict_each_other_are_bad_input(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_an_overridden_field_is_validated_like_any_other(capsys: pytest.CaptureFixture[str]) -> None:
    example = ROOT / "examples" / "quickstart.yaml"
    assert main(["run", str(example), "--set", "spec.sampling.topP=0.9"]) == 2
    assert "spec.sampling.topP" in capsys.readouterr().err


def test_an_operator_that_is_told_to_stop_while_it_starts_ends_at_once() -> None:
    """As process 1 it would not hear the default action, and live on to the end of its grace period."""
    script = f"""
import os, signal, sys, types
module = types.ModuleType("rljob_operator.main")

def main():
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    os.kill(os.getpid(), signal.SIGTERM)
    return {EXIT_WENT_ON}

module.main = main
sys.modules["rljob_operator.main"] = module
from rljob.main import main as rljob
sys.exit(rljob(["operator"]))
"""
    ended = subprocess.run([sys.executable, "-c", script], timeout=120, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
