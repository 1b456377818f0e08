"""Outcome rows -> a published table, and back. Nothing here knows Ray or a model."""
