"""An asynchronous run in one process, simulated step by step, to compare sources of old log-probabilities.

Read `simulation.py` first. `python -m bench.staleness run` makes the data, `... plot` the figures and tables from it.
"""
