"""An adapter's folder as it leaves training: peft's own files, and what a server is to know.

`manifest.json` is written last, and the folder appears whole or not at all.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import file_digest, sha256
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The model that was adapted; SHA-256 digests in hexadecimal."""

    name: str
    weights: str
    """Of the digests of its safetensors files, in the order of their names."""
    tokenizer: str | None
    """Of `tokenizer.json`."""
    chat_template: str | None
    """Of the template's text."""

    @classmethod
    def of(cls, path: Path, tokenizer: PreTrainedTokenizerBase) -> "Base":
        """Of a folder with a model in it."""
        weights = sha256()
        for file in sorted(path.glob("*.safetensors")):
            weights.update(_digest(file).encode())
        told = path / "tokenizer.json"
        template = tokenizer.chat_template
        return cls(
            name=path.name,
            weights=weights.hexdigest(),
            tokenizer=_digest(told) if told.exists() else None,
            chat_template=None if template is None else sha256(str(template).encode()).hexdigest(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What `manifest.json` says."""

    kind: Literal["policy", "verifier"]
    base: Base
    judging: dict[str, Any] | None = None
    """A verifier's labels, the delimiter of steps, and in whose turn it reads."""
    recipe: dict[str, Any]
    data: dict[str, str] = field(default_factory=dict)
    """Digests of what was learned from, by name."""
    compute: dict[str, float]
    """What training took, by unit."""
    evaluation: dict[str, float] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Beside peft's files."""
        said = {"schema_version": SCHEMA_VERSION} | asdict(self)
        (folder / "manifest.json").write_text(json.dumps(said, indent=1) + "\n")


@contextmanager
def publishing(out: Path) -> Iterator[Path]:
    """A folder to write an adapter to; once the block has ended well, it is at `out`.

    What was there before is replaced.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield folder
        folder.chmod(0o755)
        if out.exists():
            aside = Path(mkdtemp(prefix=f".{out.name}-old-", dir=out.parent))
            os.replace(out, aside)
            os.replace(folder, out)
            shutil.rmtree(aside)
        else:
            os.replace(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _digest(file: Path) -> str:
    with file.open("rb") as bytes_:
        return file_digest(bytes_, "sha256").hexdigest()
