"""From a pool of samples to a calibration, and how well it does on problems it was not fitted to.

One pool serves every number of samples: a state after n samples is a random subset of them. All
figures that are reported are out of fold, by problem.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import log, sqrt
from statistics import fmean
from typing import Any, cast

import numpy
import sklearn.isotonic  # pyright: ignore[reportMissingTypeStubs, reportUnusedImport]
import sklearn.linear_model  # pyright: ignore[reportMissingTypeStubs, reportUnusedImport]
import sklearn.model_selection  # pyright: ignore[reportMissingTypeStubs, reportUnusedImport]
import sklearn.preprocessing  # pyright: ignore[reportMissingTypeStubs, reportUnusedImport]

from strategies.core.calibration import (
    Ballot,
    Bin,
    Calibration,
    Cell,
    Logit,
    More,
    Rule,
    Stage,
    features,
    leader,
    plan,
)

np, learn = cast(Any, numpy), cast(Any, sklearn)  # neither has types

FOLDS = 5
_MOST_KNOTS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote:
    """A sample of the pool."""

    place: int | None
    right: bool
    score: float | None
    tokens: int
    """Its own."""
    likelihood: float | None = None
    """The geometric mean probability of these."""

    @property
    def ballot(self) -> Ballot:
        """As it is voted with."""
        return Ballot(self.place, self.score, self.tokens, self.likelihood)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooled:
    """A problem with its samples, and what searches ended with."""

    prompt_tokens: int
    samples: tuple[Vote, ...]
    judging: float
    """Tokens of the verifier for each sample."""
    searches: dict[str, tuple[tuple[Vote, ...], int]] = field(
        default_factory=dict[str, tuple[tuple[Vote, ...], int]]
    )
    """By name: its solutions, and all the tokens it took."""

    @property
    def rate(self) -> float:
        """Of the samples, how many are right."""
        return fmean(one.right for one in self.samples)

    def cost(self, votes: Sequence[Vote]) -> float:
        """Tokens to draw and judge samples."""
        return sum(one.tokens for one in votes) + self.judging * len(votes)


def right(votes: Sequence[Vote], rule: Rule) -> bool:
    """Whether the leading answer is."""
    first = leader([one.ballot for one in votes], rule)
    return first is not None and any(one.right for one in votes if one.place == first)


def stages_of(samples: int) -> tuple[int, ...]:
    """1, 2, 3, 4, 6, 8, 12, 16 … as far as the pool reaches."""
    found = sorted({1, *(k * 2**power for power in range(8) for k in (2, 3))})
    return tuple(n for n in found if n <= samples) or (samples,)


def best_rule(pool: Sequence[Pooled], *, n: int, seed: int) -> Rule:
    """The one that elects best, of `n` samples; the simplest if they are alike."""
    rng = random.Random(seed)
    drawn = [(one, rng.sample(one.samples, min(n, len(one.samples)))) for one in pool]
    judged = all(vote.score is not None for one in pool for vote in one.samples)
    rules: tuple[Rule, ...] = ("votes", "weighted", "max") if judged else ("votes",)
    return max(rules, key=lambda rule: fmean(right(votes, rule) for _, votes in drawn))


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """What is fitted to some problems."""

    bins: tuple[Bin, ...]
    stages: tuple[Stage, ...]
    fixed: tuple[tuple[float, float], ...]


def fit(pool: Sequence[Pooled], rule: Rule, *, bins: int, draws: int, seed: int) -> Fitted:
    """Bins of equal numbers of problems, and for each stage what is known after it."""
    rng = random.Random(seed)
    rates = sorted(one.rate for one in pool)
    edges = sorted({rates[len(rates) * k // bins] for k in range(1, bins)} - {rates[0]})
    placed = [sum(one.rate >= edge for edge in edges) for one in pool]
    found = [Bin(below=edge, problems=placed.count(at)) for at, edge in enumerate([*edges, 1.0])]
    size = min(len(one.samples) for one in pool)
    stages = [
        _stage(
            n, pool, placed, rule, later=[m for m in stages_of(size) if m > n], draws=draws, rng=rng
        )
        for n in stages_of(size)
    ]
    return Fitted(bins=tuple(found), stages=tuple(stages), fixed=_fixed(pool, rule, size, rng))


def _stage(
    n: int,
    pool: Sequence[Pooled],
    placed: Sequence[int],
    rule: Rule,
    *,
    later: Sequence[int],
    draws: int,
    rng: random.Random,
) -> Stage:
    orders = [
        (at, rng.sample(one.samples, len(one.samples)))
        for at, one in enumerate(pool)
        for _ in range(draws)
    ]
    raw = np.array(
        [
            features([vote.ballot for vote in order[:n]], rule, pool[at].prompt_tokens)
            for at, order in orders
        ]
    )
    groups = np.array([at for at, _ in orders])
    now = np.array([right(order[:n], rule) for _, order in orders])
    bins = np.array([placed[at] for at, _ in orders])
    scaler = learn.preprocessing.StandardScaler().fit(np.where(np.isnan(raw).all(0), 0.0, raw))
    scaled = np.nan_to_num(scaler.transform(raw))  # what is not known is as usual
    sure, knots = _confidence(scaled, now, groups)
    count = max(placed) + 1
    options: list[More] = []
    for m in later:
        after = np.array([right(order[:m], rule) for _, order in orders])
        cost = np.array([pool[at].cost(order[n:m]) for at, order in orders])
        options.append(_more(str(m), scaled, after, cost, bins, count))
    for name in pool[0].searches:
        after = np.array(
            [right([*order[:n], *pool[at].searches[name][0]], rule) for at, order in orders]
        )
        cost = np.array([float(pool[at].searches[name][1]) for at, _ in orders])
        options.append(_more(name, scaled, after, cost, bins, count))
    return Stage(
        samples=n,
        centre=tuple(scaler.mean_.tolist()),
        scale=tuple(scaler.scale_.tolist()),
        difficulty=_difficulty(scaled, bins, count),
        right=sure,
        knots=knots,
        more=tuple(options),
    )


def _confidence(
    scaled: Any, now: Any, groups: Any
) -> tuple[Logit, tuple[tuple[float, float], ...]]:
    """A logistic model, and how often it was right where it says so, out of fold."""
    model = _whether(scaled, now)
    if len(set(now.tolist())) < 2:
        return model, ()
    folds = learn.model_selection.GroupKFold(min(FOLDS, len(set(groups.tolist()))))
    said = learn.model_selection.cross_val_predict(
        _logistic(), scaled, now, groups=groups, cv=folds, method="predict_proba"
    )[:, 1]
    steps = learn.isotonic.IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(said, now)
    knots = list(zip(steps.X_thresholds_.tolist(), steps.y_thresholds_.tolist(), strict=True))
    thinned = knots[:: max(1, len(knots) // _MOST_KNOTS)]
    if thinned[-1] != knots[-1]:
        thinned.append(knots[-1])
    return model, tuple(thinned)


def _logistic() -> Any:
    return learn.linear_model.LogisticRegression(max_iter=2000)


def _whether(scaled: Any, what: Any) -> Logit:
    """A logistic model of something that is so or not; a constant where it always is, or never."""
    if len(set(what.tolist())) < 2:
        return Logit(weights=(0.0,) * scaled.shape[1], bias=_logit(what.mean(), len(what)))
    model = _logistic().fit(scaled, what)
    return Logit(weights=tuple(model.coef_[0].tolist()), bias=float(model.intercept_[0]))


def _difficulty(scaled: Any, bins: Any, count: int) -> tuple[Logit, ...]:
    flat = (0.0,) * scaled.shape[1]
    if len(set(bins.tolist())) < 2:
        return tuple(Logit(weights=flat, bias=0.0) for _ in range(count))
    model = _logistic().fit(scaled, bins)
    if count == 2:  # a single row, which speaks of the second bin
        return Logit(weights=flat, bias=0.0), Logit(
            weights=tuple(model.coef_[0].tolist()), bias=float(model.intercept_[0])
        )
    return tuple(
        Logit(weights=tuple(weights.tolist()), bias=float(bias))
        for weights, bias in zip(model.coef_, model.intercept_, strict=True)
    )


def _more(option: str, scaled: Any, after: Any, cost: Any, bins: Any, count: int) -> More:
    return More(
        option=option,
        right=_whether(scaled, after),
        tokens=tuple(
            float(cost[bins == at].mean()) if (bins == at).any() else float(cost.mean())
            for at in range(count)
        ),
    )


def _fixed(
    pool: Sequence[Pooled], rule: Rule, size: int, rng: random.Random
) -> tuple[tuple[float, float], ...]:
    """(tokens, accuracy) of 1, 2, 4 … samples; what costs more and gives less is left out."""
    points: list[tuple[float, float]] = []
    for n in [2**k for k in range(9) if 2**k <= size]:
        drawn = [(one, rng.sample(one.samples, n)) for one in pool for _ in range(8)]
        tokens = fmean(one.cost(votes) for one, votes in drawn)
        accuracy = fmean(right(votes, rule) for _, votes in drawn)
        if not points or (accuracy > points[-1][1] and tokens > points[-1][0]):
            points.append((tokens, accuracy))
    return tuple(points)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """One simulated run."""

    right: bool
    tokens: float
    confidence: float


def simulate(one: Pooled, calibration: Calibration, *, budget: float, rng: random.Random) -> Spent:
    """What `compute_optimal` does on a problem whose samples are known."""
    order = rng.sample(one.samples, len(one.samples))
    price = calibration.price(budget)
    n, tokens, found = calibration.stages[0].samples, 0.0, list[Vote]()
    while True:
        tokens += one.cost(order[len(found) : n])
        found = list(order[:n])
        decision = plan(
            calibration,
            [vote.ballot for vote in found],
            prompt_tokens=one.prompt_tokens,
            price=price,
            left=None,
            most=len(order),
        )
        if decision.option is None:
            break
        if not decision.option.isdigit():
            votes, took = one.searches[decision.option]
            found += votes
            tokens += took
            decision = plan(
                calibration,
                [vote.ballot for vote in found],
                prompt_tokens=one.prompt_tokens,
                price=price,
                left=0.0,
                most=0,
            )
            break
        n = calibration.advanced(n, int(decision.option))
    assert decision.confidence is not None
    return Spent(
        right=right(found, calibration.rule), tokens=tokens, confidence=decision.confidence
    )


def cells(
    pool: Sequence[Pooled], bins: Sequence[Bin], rule: Rule, *, seed: int
) -> tuple[Cell, ...]:
    """Every fixed way to spend, by bin: numbers of samples by vote and by the rule, searches."""
    rng = random.Random(seed)
    edges = [one.below for one in bins[:-1]]
    placed = [sum(one.rate >= edge for edge in edges) for one in pool]
    size = min(len(one.samples) for one in pool)
    ways: dict[str, list[tuple[bool, float]]] = {}
    for n in [2**k for k in range(9) if 2**k <= size]:
        drawn = [(one, rng.sample(one.samples, n)) for one in pool]
        rules: dict[str, Rule] = {"majority": "votes", f"{rule} rule": rule}
        for name, by in rules.items():
            way = [(right(votes, by), one.cost(votes)) for one, votes in drawn]
            ways[f"{name}, {n} samples"] = way
    for name in pool[0].searches:
        ways[name] = [
            (right(one.searches[name][0], rule), float(one.searches[name][1])) for one in pool
        ]
    return tuple(_cell(name, way, placed, len(bins)) for name, way in ways.items())


def _cell(name: str, way: Sequence[tuple[bool, float]], placed: Sequence[int], bins: int) -> Cell:
    of_bins = [
        [run for run, at in zip(way, placed, strict=True) if at == bin_] for bin_ in range(bins)
    ]
    bounds = [wilson(sum(hit for hit, _ in runs), len(runs)) for runs in of_bins]
    return Cell(
        name=name,
        tokens=tuple(fmean(tokens for _, tokens in runs) if runs else 0.0 for runs in of_bins),
        accuracy=tuple(fmean(hit for hit, _ in runs) if runs else 0.0 for runs in of_bins),
        low=tuple(low for low, _ in bounds),
        high=tuple(high for _, high in bounds),
        mean_tokens=fmean(tokens for _, tokens in way),
        mean_accuracy=fmean(hit for hit, _ in way),
    )


def wilson(hits: int, n: int) -> tuple[float, float]:
    """A 95 % interval of a proportion (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    z = 1.96
    p, squared = hits / n, z * z
    middle = (p + squared / (2 * n)) / (1 + squared / n)
    half = z * sqrt(p * (1 - p) / n + squared / (4 * n * n)) / (1 + squared / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def calibration_error(runs: Sequence[Spent], *, parts: int = 10) -> float:
    """Expected calibration error (Naeini et al. 2015), over equal widths of confidence."""
    total = 0.0
    for part in range(parts):
        mine = [one for one in runs if min(parts - 1, int(one.confidence * parts)) == part]
        if mine:
            gap = fmean(one.confidence for one in mine) - fmean(one.right for one in mine)
            total += len(mine) / len(runs) * abs(gap)
    return total


def _logit(rate: float, n: int) -> float:
    smooth = (rate * n + 0.5) / (n + 1)
    return log(smooth / (1 - smooth))
