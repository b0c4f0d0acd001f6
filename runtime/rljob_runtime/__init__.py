"""Trainer, rollout worker, weights, environments and correction."""
