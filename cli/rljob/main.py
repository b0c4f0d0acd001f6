"""The command `rljob`.

Exit codes: 0 done, 1 the run or the check failed, 2 bad input, 130 interrupted.

Imports are light: each sub-command brings its own, so that `rljob --help` and `rljob validate` answer at once.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from rljob_api.errors import BadInput, RljobError, SpecError

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.action(options))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except RljobError as error:
        if options.debug:
            raise
        return _explain(error)


def _explain(error: RljobError) -> int:
    """Say what is wrong, on standard error, and return the exit code that goes with it."""
    if isinstance(error, SpecError):
        print(f"rljob: the RLJob is refused, {len(error.violations)} problem(s):", file=sys.stderr)
        for violation in error.violations:
            print(f"  {violation}", file=sys.stderr)
        return EXIT_BAD_INPUT
    print(f"rljob: error: {error}", file=sys.stderr)
    return EXIT_BAD_INPUT if isinstance(error, BadInput) else EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rljob",
        description="Asynchronous reinforcement learning of language models with exact old log-probabilities.",
        epilog="exit codes: 0 done, 1 the run or the check failed, 2 bad input, 130 interrupted",
    )
    parser.add_argument("--version", action="version", version=f"rljob {version('rljob')}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
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
    run.add_argument(
        "--no-record", dest="record_bytes", action="store_const", const=0, help="keep no record: as --record-bytes 0"
    )
    run.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="change a field of the file, as in spec.training.steps=40; VALUE is JSON, else text (may be repeated)",
    )
    run.add_argument("--plain", action="store_true", help="one line a step, also on a terminal")
    run.set_defaults(action=_run)

    validate = commands.add_parser("validate", help="say whether an RLJob is valid, and every reason why not")
    validate.add_argument("file", type=Path, help="the RLJob (YAML or JSON)")
    validate.add_argument("--cluster", action="store_true", help="judge as a cluster does, not as `rljob run`")
    validate.set_defaults(action=_validate)

    crd = commands.add_parser("crd", help="print the CustomResourceDefinition, for `kubectl apply -f -`")
    crd.set_defaults(action=_crd)

    verify = commands.add_parser(
        "verify", help="re-score a run's record independently and check that no token is missing"
    )
    verify.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    verify.add_argument("--tokens", type=int, default=2000, help="tokens to re-score at least (default: 2000)")
    verify.set_defaults(action=_verify)

    report = commands.add_parser("report", help="write the HTML report of one or more runs, side by side")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    report.add_argument("--output", type=Path, help="file to write (default: report.html in the first run)")
    report.set_defaults(action=_report)

    commands.add_parser("trainer", help="one trainer process (started by torchrun)").set_defaults(action=_trainer)
    commands.add_parser("operator", help="the Kubernetes operator").set_defaults(action=_operator)
    commands.add_parser("rollout", help="one rollout worker").set_defaults(action=_rollout)
    commands.add_parser("old-policy", help="one old-policy worker").set_defaults(action=_old_policy)
    return parser


def _run(options: argparse.Namespace) -> int:
    from rljob.loader import load_document
    from rljob.overrides import with_settings
    from rljob.run import RunOptions, new_run, resume_run
    from rljob_api.validate import parse_job

    settings = RunOptions(nats_port=options.nats_port, record_bytes=options.record_bytes, plain=options.plain)
    if (options.file is None) == (options.resume is None):
        raise BadInput("give either a FILE or --resume RUN")
    if options.resume is not None:
        if options.settings or options.run_dir is not None:
            raise BadInput(
                "--resume goes on with the run's own settings in its own folder: leave out --set and --run-dir"
            )
        return resume_run(options.resume, settings, sys.stdout)
    document = with_settings(load_document(options.file), options.settings)
    return new_run(parse_job(document), options.run_dir, settings, sys.stdout)


def _validate(options: argparse.Namespace) -> int:
    from rljob.validate_command import validate

    return validate(options.file, sys.stdout, on_cluster=options.cluster)


def _crd(_: argparse.Namespace) -> int:
    from rljob.crd_command import print_crd

    return print_crd(sys.stdout)


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


def _operator(_: argparse.Namespace) -> int:
    # Process 1 of its pod does not hear SIGTERM before it has a handler, and the imports take seconds: it would go on, take the
    # lease over from whom it was to follow, and be killed with it in hand.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until the operator has its own
    from rljob_operator.main import main as operator_main

    return operator_main()


def _rollout(_: argparse.Namespace) -> int:
    from rljob_runtime.rollout.main import main as rollout_main

    return rollout_main()


def _old_policy(_: argparse.Namespace) -> int:
    from rljob_runtime.old_policy.main import main as old_policy_main

    return old_policy_main()


if __name__ == "__main__":
    raise SystemExit(main())
