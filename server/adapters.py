"""What an adapter's folder says of it, besides its weights."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from strategies.core.errors import InvalidRequest

MANIFEST = "mull.json"
"""The file in an adapter's folder that says what the adapter is for."""

_LONGEST = 65_536
"""Bytes of a manifest."""


class LabelTokens(BaseModel):
    """The tokens with which a verifier says its opinion, as the tokenizer spells them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    good: str = Field(min_length=1, max_length=100)
    bad: str = Field(min_length=1, max_length=100)


class Opening(BaseModel):
    """What stands in a verifier's prompt in place of the words that open an answer's turn."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    answers: str = Field(min_length=1, max_length=200)
    """The end of a prompt that is to be answered, such as `<|im_start|>assistant` and a newline."""
    verdicts: str = Field(min_length=1, max_length=200)


class Manifest(BaseModel):
    """What an adapter is for. Fields that a later version adds are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    labels: LabelTokens | None = None
    """A verifier's."""
    delimiter: str = Field(default="\n", min_length=1, max_length=32)
    """Ends a step."""
    opening: Opening | None = None
    """If a verifier learned to judge answers in a turn of its own."""


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest in a folder; None without one.

    Raises:
        InvalidRequest: It is not readable.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > _LONGEST:
            raise ValueError("it is too long")
        return Manifest.model_validate_json(path.read_text())
    except (OSError, ValueError, ValidationError) as error:
        raise InvalidRequest(f"{path.name} of adapter '{folder.name}': {error}") from error
