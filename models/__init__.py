"""The models that Mull ships."""

from pathlib import Path

MULL_TINY = Path(__file__).parent / "mull-tiny"
"""The embedded default model; its card is the README.md in the folder."""
