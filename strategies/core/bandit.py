"""Which of several models the next samples come from: more from the one whose samples are better.

Thompson sampling (Thompson 1933; for rewards in [0, 1], Agrawal and Goyal 2012, arXiv:1111.1797):
each model's worth has a Beta posterior, and each sample goes to the model whose draw is highest.
"""

import random
from collections.abc import Sequence


class Bandit:
    """The posteriors of some arms, by name. Changes when it is told a reward; never awaits."""

    def __init__(self, names: Sequence[str], seed: int | None) -> None:
        self._names = names
        self._rng = random.Random(seed)
        self._good = dict.fromkeys(names, 1.0)
        self._bad = dict.fromkeys(names, 1.0)
        self._tried = False

    def pull(self, times: int) -> list[str]:
        """Whom the next samples come from; the first time, from each alike."""
        if not self._tried:
            self._tried = True
            return [self._names[at % len(self._names)] for at in range(times)]
        return [max(self._names, key=self._worth) for _ in range(times)]

    def tell(self, name: str, reward: float) -> None:
        """What a sample was worth, in [0, 1]."""
        self._good[name] += reward
        self._bad[name] += 1 - reward

    def _worth(self, name: str) -> float:
        return self._rng.betavariate(self._good[name], self._bad[name])
