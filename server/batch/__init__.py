"""Batches: many prompts under one budget, as a route and as files."""
