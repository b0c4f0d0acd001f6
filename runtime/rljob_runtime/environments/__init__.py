"""Environments pose tasks and score answers: text in and out, multi-turn."""
