"""Experiments: one folder each, with its job file, its models and its data."""
