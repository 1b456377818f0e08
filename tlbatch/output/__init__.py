"""Outcome rows -> a published table, and back. This package uses neither Ray nor a model."""
