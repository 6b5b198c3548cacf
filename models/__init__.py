"""The models that Mull ships."""

from pathlib import Path

MULL_TINY = Path(__file__).parent / "mull-tiny"
"""The embedded default model; its card is the README.md in the folder, as for those below."""

MULL_TINY_VERIFIER = Path(__file__).parent / "mull-tiny-verifier"
"""A LoRA of it that judges each line of a solution."""

MULL_TINY_PRICES = Path(__file__).parent / "mull-tiny-prices"
"""A LoRA of it that knows a domain which pretraining never saw."""

MULL_TINY_RFT = Path(__file__).parent / "mull-tiny-rft"
"""A LoRA of it that has learned from its own right solutions."""
