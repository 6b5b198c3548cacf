"""What an adapter's folder says of it, besides its weights: the treaty with whoever trained it."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from strategies.core.errors import InvalidRequest

MANIFEST = "manifest.json"

_LONGEST = 1 << 20
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


class Judging(BaseModel):
    """How a verifier is asked, and how it answers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    labels: LabelTokens
    delimiter: str = Field(default="\n", min_length=1, max_length=32)
    """Ends a step."""
    opening: Opening | None = None
    """If it learned to judge answers in a turn of its own."""


class Trained(BaseModel):
    """The model that an adapter was trained on; a digest that is not known is not compared."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str = Field(default="", max_length=1000)
    weights: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """SHA-256 of the SHA-256 of its safetensors files, in hexadecimal, in the order of names."""
    tokenizer: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """Of `tokenizer.json`."""
    chat_template: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """Of the template's text."""


class Manifest(BaseModel):
    """What an adapter is for and where it comes from. What a later version adds is passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    schema_version: Literal[1]
    kind: Literal["policy", "verifier"]
    base: Trained = Trained()
    judging: Judging | None = None
    """A verifier's."""
    recipe: dict[str, Any] = {}
    data: dict[str, str] = {}
    """Digests of what it learned from, by name."""
    compute: dict[str, float] = {}
    """What its training took, by unit."""
    evaluation: dict[str, float] = {}
    """How good it is, by name of the measure; what gates look at."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.kind == "verifier") != (self.judging is not None):
            raise ValueError("a verifier has 'judging', and nothing else has")
        return self


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
        raise InvalidRequest(f"{path.name} is damaged: {error}", field="path") from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Into a folder that has none."""
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n")
