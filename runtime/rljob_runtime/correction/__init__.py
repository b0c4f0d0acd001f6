"""Decoupled policy loss, ratios and diagnostics: pure tensor code (docs/algorithms.md)."""
