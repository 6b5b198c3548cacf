"""Mull as a server: requests in, answers out, on vLLM or before it."""
