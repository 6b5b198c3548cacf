"""Search over a language model at inference time: strategies, budgets, answers.

Knows no server and no engine.
"""
