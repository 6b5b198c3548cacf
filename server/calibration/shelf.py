"""The calibrations that a server has, by the name of the model that they speak of."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from strategies.compute_optimal import SEARCH
from strategies.core.calibration import Calibration


class Shelf:
    """Files of a directory. What is not about the weights that are served is kept, and not used."""

    def __init__(self, folder: Path | None) -> None:
        """Read them.

        Raises:
            ValueError: A file is no calibration; the message names it.
        """
        self._all = (
            [] if folder is None else [_read(file) for file in sorted(folder.glob("*.json"))]
        )
        self._refused: dict[str, str] = {}
        names = [one.model for one in self._all]
        if doubled := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"{folder} has several calibrations of '{doubled.pop()}'")
        self.weights: str | None = None
        """SHA-256 of what is served, once that is known."""

    def check(self, weights: str | None) -> None:
        """Refuse those of other weights."""
        self.weights = weights
        for one in self._all:
            if one.digests.get("weights") != weights:
                self._refused[one.name] = "it is of other weights than those that are served"

    def find(self, model: str) -> Calibration | None:
        """That of a served name."""
        usable = (one for one in self._all if one.name not in self._refused)
        return next((one for one in usable if one.model == model), None)

    def cards(self) -> Sequence[dict[str, Any]]:
        """What each says, without the numbers that only the planner reads."""
        return [
            {
                "id": one.name,
                "object": "calibration",
                "usable": one.name not in self._refused,
                "refused": self._refused.get(one.name),
            }
            | one.model_dump(mode="json", exclude={"stages", "name"})
            | {"stages": [stage.samples for stage in one.stages]}
            for one in self._all
        ]


def _read(file: Path) -> Calibration:
    try:
        found = Calibration.model_validate_json(file.read_bytes())
        for search in found.searches.values():
            SEARCH.validate_python(search)
    except (OSError, ValidationError) as error:
        said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise ValueError(
            f"{file} is no calibration that this version reads, see mull calibrate: {said}"
        ) from None
    return found
