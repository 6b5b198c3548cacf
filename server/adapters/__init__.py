"""Adapters: what their folders say, what may be served, and which version a name means."""
