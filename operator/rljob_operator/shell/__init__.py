"""All I/O of the operator: caches, queue, lease, writes, coordinators. What to do is decided in `core`."""
