"""Measurements: each prints a table, shows progress, and writes `--json PATH` with stable keys."""
