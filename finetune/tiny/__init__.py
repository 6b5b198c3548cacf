"""The embedded model `mull-tiny`.

Its problems, tokenizer, training and measurement, from a seed.
"""
