"""Weight versions and interruption, both sides, and the NATS shell around the pure machines."""
