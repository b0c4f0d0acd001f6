"""The dedicated route: processes beside the trainer that hold old weight versions and score trajectories as they arrive."""
