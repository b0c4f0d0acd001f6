"""The command `rljob`.

Exit codes: 0 done, 1 the run or the check failed, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from rljob_api.errors import RljobError, SpecError

EXIT_FAILED, EXIT_BAD_INPUT = 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.action(options))
    except SpecError as error:
        print(f"rljob: the RLJob is refused, {len(error.violations)} problem(s):", file=sys.stderr)
        for violation in error.violations:
            print(f"  {violation}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except RljobError as error:
        print(f"rljob: error: {error}", file=sys.stderr)
        return EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rljob",
        description="Asynchronous reinforcement learning of language models with exact old log-probabilities.",
    )
    parser.add_argument("--version", action="version", version=f"rljob {version('rljob')}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run an RLJob on this machine")
    run.add_argument("file", nargs="?", type=Path, help="the RLJob (YAML or JSON)")
    run.add_argument("--run-dir", type=Path, help="where the run is kept (default: runs/<name>-<time>)")
    run.add_argument("--resume", type=Path, metavar="RUN", help="go on with a run from its last checkpoint")
    run.add_argument("--nats-port", type=int, help="port of the embedded nats-server (default: a free one)")
    run.add_argument(
        "--record-bytes",
        type=int,
        default=1 << 30,
        help="bound of the record for `rljob verify`; 0 keeps none (default: 1 GiB)",
    )
    run.add_argument("--plain", action="store_true", help="one line a step, also on a terminal")
    run.set_defaults(action=_run)

    validate = commands.add_parser("validate", help="say whether an RLJob is valid, and every reason why not")
    validate.add_argument("file", type=Path)
    validate.set_defaults(action=_validate)

    verify = commands.add_parser(
        "verify", help="re-score a run's record independently and check that no token is missing"
    )
    verify.add_argument("run", type=Path, metavar="RUN")
    verify.add_argument("--tokens", type=int, default=2000, help="tokens to re-score at least (default: 2000)")
    verify.set_defaults(action=_verify)

    report = commands.add_parser("report", help="write the HTML report of one or more runs, side by side")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    report.add_argument("--output", type=Path, help="file to write (default: report.html in the first run)")
    report.set_defaults(action=_report)

    commands.add_parser("trainer", help="one trainer process (started by torchrun)").set_defaults(action=_trainer)
    commands.add_parser("rollout", help="one rollout worker").set_defaults(action=_rollout)
    return parser


def _run(options: argparse.Namespace) -> int:
    from rljob.loader import load_document
    from rljob.run import RunOptions, new_run, resume_run
    from rljob_api.validate import parse_job

    settings = RunOptions(nats_port=options.nats_port, record_bytes=options.record_bytes, plain=options.plain)
    if options.resume is not None:
        return resume_run(options.resume, settings, sys.stdout)
    if options.file is None:
        print("rljob run: give a FILE, or --resume RUN", file=sys.stderr)
        return EXIT_BAD_INPUT
    return new_run(parse_job(load_document(options.file)), options.run_dir, settings, sys.stdout)


def _validate(options: argparse.Namespace) -> int:
    from rljob.validate_command import validate

    return validate(options.file, sys.stdout)


def _verify(options: argparse.Namespace) -> int:
    from rljob.verify import verify

    return verify(options.run, minimum_tokens=options.tokens, out=sys.stdout)


def _report(options: argparse.Namespace) -> int:
    from rljob.report import write_report
    from rljob.run_directory import RunDirectory

    directories = [RunDirectory(path) for path in options.runs]
    output = options.output or directories[0].report_file
    write_report(directories, output)
    print(output)
    return 0


def _trainer(_: argparse.Namespace) -> int:
    from rljob_runtime.trainer.main import main as trainer_main

    return trainer_main()


def _rollout(_: argparse.Namespace) -> int:
    from rljob_runtime.rollout.main import main as rollout_main

    return rollout_main()


if __name__ == "__main__":
    raise SystemExit(main())
