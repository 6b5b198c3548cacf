"""Who judges candidates: rules, reward models, adapters and language models."""
