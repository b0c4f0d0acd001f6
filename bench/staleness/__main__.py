"""`python -m bench.staleness run [SWEEP ...]` makes data, `python -m bench.staleness plot` figures and tables from it.

Runs go to bench/staleness/results/, one line each; a run that is there is not made again, so a sweep that was cut off
goes on where it stopped. Two processes share a sweep with `--share 0/2` and `--share 1/2`.
"""

from __future__ import annotations

import argparse
import itertools
import time

import torch

from bench.measure import machine
from bench.staleness import device_time, proposition, sweeps
from bench.staleness.results import append, load_document, missing, save_document
from bench.staleness.settings import Settings
from bench.staleness.simulation import run

DOCUMENTS = ("proposition", "device_time")


def main(argv: list[str] | None = None) -> int:
    """Parse and do."""
    parser = argparse.ArgumentParser(prog="python -m bench.staleness", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="make the runs that are missing (all sweeps: about 35 CPU minutes)")
    names = (*sweeps.CALIBRATIONS, *sweeps.SWEEPS, *DOCUMENTS)
    runs.add_argument("sweeps", nargs="*", metavar="SWEEP", help=f"of {', '.join(names)}; all if none is named")
    runs.add_argument("--share", default="0/1", metavar="I/N", help="only every N-th run, from the I-th")
    commands.add_parser("plot", help="write docs/images/ and the tables of docs/results.md from the results")
    arguments = parser.parse_args(argv)
    if arguments.command == "plot":
        from bench.staleness import report

        report.write()
        return 0
    unknown = set(arguments.sweeps) - set(names)
    if unknown:
        parser.error(f"no such sweep: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    torch.set_num_threads(1)  # the matrices are small: a second thread costs more than it brings
    index, count = (int(part) for part in arguments.share.split("/"))
    for name in arguments.sweeps or names:
        _make(name, index, count)
    return 0


def _make(name: str, index: int, count: int) -> None:
    if name == "device_time":
        save_document(
            name, {"table": device_time.table(), "ideal": device_time.ideal_table(1, 3, ((1, 2), (1, 3), (1, 1)))}
        )
        return
    if name == "proposition":
        if load_document(name) is None and index == 0:
            save_document(name, {"runs": [proposition.compare(settings) for settings in _of_proposition()]})
        return
    if name in sweeps.CALIBRATIONS:
        wanted = sweeps.CALIBRATIONS[name]()
    else:
        wanted = sweeps.SWEEPS[name](sweeps.calibrated_bound(name))
    for settings in missing(itertools.islice(wanted, index, None, count), name):
        record = run(settings) | {"machine": machine(), "date": time.strftime("%Y-%m-%d", time.gmtime())}
        append(name, settings, record)
        print(
            f"{name}: {settings.delay} cap {settings.cap} {settings.arm} seed {settings.seed}: "
            f"reward {record['reward'][-1]:.3f}, {record['cpu_seconds']} CPU s",
            flush=True,
        )


def _of_proposition() -> list[Settings]:
    return [
        Settings(
            arm="log-linear",
            cap=sweeps.ABLATION_CAP,
            delay="variable",
            seed=seed,
            discrepancy_bound=sweeps.calibrated_bound(),
            trainer=trainer,
        )
        for trainer in ("float32", "float64")
        for seed in sweeps.SEEDS
    ]


if __name__ == "__main__":
    raise SystemExit(main())
