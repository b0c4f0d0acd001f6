"""A real Kubernetes on one Linux machine without a container engine or a registry: `python -m tools.devcluster up`.

Not part of the distribution: it exists for development and for `make e2e`. Read `cluster.py` first.
"""
