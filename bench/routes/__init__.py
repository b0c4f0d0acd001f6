"""The routes to old log-probabilities side by side, on the rollouts of a real run; figures on docs/results.md.

`python -m bench.routes --help`.
"""
