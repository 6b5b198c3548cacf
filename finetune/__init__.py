"""Mull's companion: makes the models and adapters that the server serves.

It never imports `server`.
"""
