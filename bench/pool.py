"""Many judged samples of a problem, drawn once, and what choices of n of them elect."""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import httpx

from finetune.tiny.problems import grade
from finetune.tiny.solution import Item

DRAWS = 64
"""Random choices of n samples of a problem."""

FIXED = ("majority", "weighted vote", "best-of-n")
"""How n samples elect."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One of a pool."""

    right: bool
    answer: str | None
    score: float
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """All samples of a problem, and the verifier's tokens for each."""

    samples: Sequence[Sample]
    judging: float


async def pooled(
    client: httpx.AsyncClient, body: dict[str, Any], item: Item, verifier: Any
) -> Pool:
    """The samples that `body`, with its n, draws of a problem."""
    asked = body if verifier is None else body | {"verifier": verifier}
    reply = await client.post("/v1/strategies/best_of_n", json=asked)
    if reply.is_error:
        raise SystemExit(f"best_of_n: {reply.text}")
    found = reply.json()
    samples = [
        Sample(
            right=grade(item, one["text"]),
            answer=one["answer"] if one["finish_reason"] == "stop" else None,
            score=one["score"],
            tokens=one["tokens"],
        )
        for one in found["candidates"]
    ]
    return Pool(samples=samples, judging=found["mull"]["usage"]["verifier_tokens"] / len(samples))


def fixed(method: str, n: int, pool: Pool) -> tuple[float, float]:
    """How often n of the samples elect what is right, and the tokens that they take."""
    rng = random.Random(n)
    n = min(n, len(pool.samples))
    drawn = [rng.sample(pool.samples, n) for _ in range(DRAWS)]
    tokens = n * fmean(one.tokens for one in pool.samples)
    judged = 0.0 if method == "majority" else n * pool.judging
    return fmean(elected(method, some) for some in drawn), tokens + judged


def elected(method: str, samples: Sequence[Sample]) -> bool:
    """Whether what they elect is right; ties go to the earliest."""
    if method == "best-of-n":
        return max(samples, key=lambda one: one.score).right
    votes: dict[str, float] = defaultdict(float)
    for one in samples:
        if one.answer is not None:
            votes[one.answer] += 1.0 if method == "majority" else one.score
    if not votes:
        return False
    winner = max(votes, key=lambda answer: votes[answer])
    return next(one.right for one in samples if one.answer == winner)
