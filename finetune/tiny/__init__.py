"""The embedded model `mull-tiny`: its problems, tokenizer, training and measurement, from a seed."""
