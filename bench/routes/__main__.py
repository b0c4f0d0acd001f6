"""`python -m bench.routes replay --record RUN/record --name STREAM-MODEL`: one replay, into bench/routes/results/.

record   keep the middle of a run's record as a small file, for `make bench`
runs     what runs say of idle time, scoring and barriers, from their step reports
plot     write the tables of docs/results.md and the figure
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file

from bench.routes.real_runs import read_run
from bench.routes.replay import WIDE, random_model, recorded_model, replay
from bench.routes.results import save_replay, save_runs
from bench.routes.stream import RECORDED, read_record, save_stream
from bench.routes.ways import Way

MEASURED_STEPS = 8


def main(argv: list[str] | None = None) -> int:
    """Parse and do."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.routes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    replays = commands.add_parser("replay", help="all ways on one stream (5 CPU minutes with --wide)")
    replays.add_argument("--record", type=Path, metavar="DIR", required=True, help="`record` folder of a run")
    replays.add_argument("--name", required=True, metavar="STREAM-MODEL", help="of the result, e.g. busy-wide")
    replays.add_argument("--steps", type=int, default=MEASURED_STEPS, help="measured steps, in the middle of the run")
    replays.add_argument("--wide", action="store_true", help="a larger random model in the place of the recorded one")
    replays.add_argument("--ways", type=Way, choices=tuple(Way), nargs="+", default=tuple(Way), help="those to compare")
    keeping = commands.add_parser("record", help="keep a few steps in bench/recorded/")
    keeping.add_argument("run", type=Path, metavar="RUN")
    keeping.add_argument("name", help="of the file")
    real = commands.add_parser("runs", help="read step reports")
    real.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    commands.add_parser("plot", help="write docs/")
    arguments = parser.parse_args(argv)
    match arguments.command:
        case "replay":
            _replay(arguments.record, arguments.name, arguments.steps, arguments.ways, is_wide=arguments.wide)
        case "record":
            save_stream(
                read_record(arguments.run / "record", MEASURED_STEPS), RECORDED / f"{arguments.name}.safetensors"
            )
        case "runs":
            save_runs([read_run(run) for run in arguments.runs])
        case _:
            from bench.routes import report

            report.write()
    return 0


def _replay(record: Path, name: str, count: int, ways: Sequence[Way], *, is_wide: bool) -> None:
    torch.set_num_threads(1)
    stream = read_record(record, count)
    ways = [way for way in ways if way is not Way.SNAPSHOT or stream.knows_what_was_ahead]
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        model = random_model(WIDE, directory) if is_wide else recorded_model(record, stream.steps[0].version, directory)
        weights = load_file(model / "model.safetensors")
        costs = replay(stream, model, ways)
    tokens = [sum(row.num_tokens for row in stream.steps[index].trajectories) for index in stream.measured]
    save_replay(
        name,
        stream=name.split("-")[0],
        parameters=sum(tensor.size for tensor in weights.values()),
        tokens=round(float(np.mean(tokens))),
        copy_bytes=sum(tensor.nbytes for tensor in weights.values()),
        costs=costs,
    )


if __name__ == "__main__":
    raise SystemExit(main())
