"""What past problems say of a new one: how hard it looks, how sure an answer is, what more buys.

Pure numbers, as `mull calibrate` writes them; knows no engine and no file.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

SCHEMA_VERSION = 3

Number = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]

Rule = Literal["votes", "weighted", "max"]
"""How samples elect an answer: one vote each, by their scores, or the best score alone."""

FEATURES = (
    "share of the leading answer",
    "lead over the second answer",
    "answers per sample",
    "samples without an answer",
    "best score of the leading answer",
    "mean score of the leading answer",
    "best score of the others",
    "mean score",
    "logarithm of tokens per sample",
    "logarithm of the tokens of the prompt",
    "likelihood of the leading answer",
    "likelihood of the others",
)
"""What a set of samples looks like; see `features`."""


@dataclass(frozen=True, slots=True)
class Ballot:
    """A sample as it is voted with."""

    place: int | None
    """Which of the different answers it gives, by number."""
    score: float | None
    """A verifier's, in [0, 1]."""
    tokens: int
    likelihood: float | None = None
    """The geometric mean probability of its tokens; None where nobody asked."""


def votes(ballots: Sequence[Ballot], rule: Rule) -> dict[int, float]:
    """By number of the answer, in the order in which they came, what samples give it."""
    found: dict[int, float] = {}
    for one in ballots:
        if one.place is not None:
            before, score = found.get(one.place, 0.0), one.score or 0.0
            found[one.place] = (
                max(before, score)
                if rule == "max"
                else before + (1.0 if rule == "votes" else score)
            )
    return found


def leader(ballots: Sequence[Ballot], rule: Rule) -> int | None:
    """The answer that samples elect, by its number; ties go to the earliest sample."""
    found = votes(ballots, rule)
    return max(found, key=lambda place: found[place], default=None)


def features(ballots: Sequence[Ballot], rule: Rule, prompt_tokens: int) -> tuple[float, ...]:
    """The numbers that `FEATURES` names; scores that nobody gave are 0.

    A likelihood that nobody asked for, or of an answer that nobody gave, is nan: `Stage.scaled`
    makes of it what is usual.
    """
    first = leader(ballots, rule)
    n = len(ballots)
    counts: dict[int, int] = {}
    for one in ballots:
        if one.place is not None:
            counts[one.place] = counts.get(one.place, 0) + 1
    others = max((count for place, count in counts.items() if place != first), default=0)
    mine = [one.score or 0.0 for one in ballots if one.place is not None and one.place == first]
    rest = [one.score or 0.0 for one in ballots if one.place != first]
    likely = [one.likelihood for one in ballots if one.place is not None and one.place == first]
    unlike = [one.likelihood for one in ballots if one.place != first]
    return (
        len(mine) / n,
        (len(mine) - others) / n,
        len(counts) / n,
        (n - sum(counts.values())) / n,
        max(mine, default=0.0),
        sum(mine) / len(mine) if mine else 0.0,
        max(rest, default=0.0),
        sum(one.score or 0.0 for one in ballots) / n,
        math.log1p(sum(one.tokens for one in ballots) / n),
        math.log1p(prompt_tokens),
        _known_mean(likely),
        _known_mean(unlike) if unlike else 0.0,
    )


def _known_mean(numbers: Sequence[float | None]) -> float:
    known = [one for one in numbers if one is not None]
    return sum(known) / len(known) if known else math.nan


class _Fitted(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Logit(_Fitted):
    """A logistic model of features that are centred and scaled."""

    weights: tuple[Number, ...] = Field(min_length=len(FEATURES), max_length=len(FEATURES))
    bias: Number

    def __call__(self, scaled: Sequence[float]) -> float:
        """The logit."""
        return self.bias + sum(w * x for w, x in zip(self.weights, scaled, strict=True))


class More(_Fitted):
    """What going on to `option` brings."""

    option: str
    """A number of samples, or the name of a search."""
    right: Logit
    """Whether the answer that leads after it is."""
    tokens: tuple[Annotated[Number, Field(ge=0)], ...]
    """By bin, further tokens, the verifier's included."""


class Stage(_Fitted):
    """What is known after so many samples."""

    samples: int = Field(ge=1, le=1024)
    centre: tuple[Number, ...] = Field(min_length=len(FEATURES), max_length=len(FEATURES))
    scale: tuple[Annotated[Number, Field(gt=0)], ...] = Field(
        min_length=len(FEATURES), max_length=len(FEATURES)
    )
    difficulty: tuple[Logit, ...] = Field(min_length=1, max_length=32)
    """One per bin; their softmax is the posterior."""
    right: Logit
    """Whether the answer that leads now is."""
    knots: tuple[tuple[Share, Share], ...] = Field(default=(), max_length=1024)
    """What `right` says, and how often it was so; ascending. What lies between is interpolated."""
    more: tuple[More, ...] = Field(default=(), max_length=64)

    def scaled(self, raw: Sequence[float]) -> list[float]:
        """Features as the models read them: in standard deviations, 0 where nothing is known."""
        return [
            0.0 if math.isnan(x) else (x - c) / s
            for x, c, s in zip(raw, self.centre, self.scale, strict=True)
        ]

    def posterior(self, raw: Sequence[float]) -> list[float]:
        """How likely the problem is of each bin."""
        scaled = self.scaled(raw)
        logits = [one(scaled) for one in self.difficulty]
        odds = [math.exp(logit - max(logits)) for logit in logits]
        return [one / sum(odds) for one in odds]

    def confidence(self, raw: Sequence[float]) -> float:
        """The probability that the leading answer is right."""
        said = _sigmoid(self.right(self.scaled(raw)))
        if not self.knots:
            return said
        if said <= self.knots[0][0]:
            return self.knots[0][1]
        for (low, below), (high, above) in pairwise(self.knots):
            if said <= high:
                part = (said - low) / (high - low) if high > low else 1.0
                return below + part * (above - below)
        return self.knots[-1][1]


class Bin(_Fitted):
    """Problems of like difficulty."""

    below: Share
    """Of samples, so many are right, less than this."""
    problems: int = Field(ge=0)


class Cell(_Fitted):
    """How well one way to spend does, on problems that were not used to say so."""

    name: str
    tokens: tuple[Number, ...]
    """By bin, mean, the verifier's included."""
    accuracy: tuple[Share, ...]
    low: tuple[Share, ...]
    """Of a 95 % interval."""
    high: tuple[Share, ...]
    mean_tokens: Number
    mean_accuracy: Share


class Calibration(_Fitted):
    """All of it; a file of `mull calibrate`, which people can read."""

    schema_version: Literal[3] = SCHEMA_VERSION
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")
    model: str
    """The served name of what was calibrated."""
    digests: dict[str, str]
    """Of the model's weights, the adapter, the verifier, the problems."""
    verifier: dict[str, Any] | None = None
    """Who judges the samples, as in a request."""
    temperature: Number | None = None
    rule: Rule
    bins: tuple[Bin, ...] = Field(min_length=1, max_length=32)
    stages: tuple[Stage, ...] = Field(min_length=1, max_length=32)
    searches: dict[str, dict[str, Any]] = Field(default_factory=dict[str, dict[str, Any]])
    """By name, in their wire form."""
    cells: tuple[Cell, ...] = Field(max_length=256)
    fixed: tuple[tuple[Number, Number], ...] = Field(min_length=1, max_length=256)
    """(tokens, accuracy) of fixed numbers of samples, ascending in both: the price of accuracy."""
    evaluation: dict[str, Number] = Field(default_factory=dict[str, float])
    """Out of fold."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        bins = len(self.bins)
        for stage in self.stages:
            if len(stage.difficulty) != bins:
                raise ValueError(f"stage {stage.samples} does not speak of {bins} bins")
            for more in stage.more:
                if len(more.tokens) != bins:
                    raise ValueError(f"'{more.option}' does not speak of {bins} bins")
                if not more.option.isdigit() and more.option not in self.searches:
                    raise ValueError(f"there is no search '{more.option}'")
        if self.searches and self.verifier is None:
            raise ValueError("searches need a verifier")
        if [one.samples for one in self.stages] != sorted({one.samples for one in self.stages}):
            raise ValueError("stages ascend")
        return self

    @property
    def reads_likelihood(self) -> bool:
        """Whether it looks at the probabilities of tokens, which an engine has to be asked for."""
        at = [FEATURES.index(name) for name in FEATURES if name.startswith("likelihood")]
        models = [
            one
            for stage in self.stages
            for one in (stage.right, *stage.difficulty, *(more.right for more in stage.more))
        ]
        return any(one.weights[place] for one in models for place in at)

    def stage(self, samples: int) -> Stage:
        """The last stage that so many samples have reached, or the first."""
        reached = [one for one in self.stages if one.samples <= samples]
        return reached[-1] if reached else self.stages[0]

    def advanced(self, samples: int, wanted: int) -> int:
        """How many samples to have next on the way to so many: they may change the plan."""
        return min([wanted, *(one.samples for one in self.stages if one.samples > samples)])

    def price(self, tokens: float) -> float:
        """Accuracy per token that a fixed number of samples buys at the end of so many tokens.

        The slope of the concave hull of `fixed`: what is dearer than that is not worth it.
        """
        hull = _hull(self.fixed)
        for (low, below), (high, above) in pairwise(hull):
            if tokens <= high:
                return (above - below) / (high - low)
        return 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do next, and why."""

    option: str | None
    """A number of samples to go on to, or a search; None: stop."""
    confidence: float | None
    """That the leading answer is right; None where nothing says."""
    posterior: tuple[float, ...]
    gain: float = 0.0
    """In P(right), expected of the option."""
    tokens: float = 0.0
    """Expected to be spent on it."""
    price: float = 0.0
    """Of a token, in P(right)."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """How it stands with a problem, and what each option would bring."""

    confidence: float
    posterior: tuple[float, ...]
    options: tuple[tuple[str, float, float], ...]
    """(name, gain in P(right), tokens), both expected."""


def outlook(
    calibration: Calibration, ballots: Sequence[Ballot], *, prompt_tokens: int, most: int
) -> Outlook:
    """What is known after these samples, of which there are to be `most` at most.

    The gain of an option is P(right after it) - P(right now), both by logistic models of the same
    features; its tokens are the mean over bins by their posterior.
    """
    stage = calibration.stage(len(ballots))
    raw = features(ballots, calibration.rule, prompt_tokens)
    posterior, scaled = tuple(stage.posterior(raw)), stage.scaled(raw)
    now = _sigmoid(stage.right(scaled))
    options: list[tuple[str, float, float]] = []
    for more in stage.more:
        if more.option.isdigit() and int(more.option) > most:
            continue
        tokens = sum(p * x for p, x in zip(posterior, more.tokens, strict=True))
        options.append((more.option, _sigmoid(more.right(scaled)) - now, tokens))
    return Outlook(stage.confidence(raw), posterior, tuple(options))


def plan(
    calibration: Calibration,
    ballots: Sequence[Ballot],
    *,
    prompt_tokens: int,
    price: float,
    left: float | None,
    most: int,
    wanted: float | None = None,
) -> Plan:
    """The option that gains most for its price, of those that fit into `left` tokens.

    It is taken if it gains more than its tokens cost at `price`; with a `wanted` confidence, if
    that is not reached and it gains at all, whatever it costs. `most` bounds the samples.
    """
    seen = outlook(calibration, ballots, prompt_tokens=prompt_tokens, most=most)
    best, worth = Plan(None, seen.confidence, seen.posterior, price=price), 0.0
    if wanted is not None and seen.confidence >= wanted:
        return best
    for option, gain, tokens in seen.options:
        net = gain - (0.0 if wanted is not None else price * tokens)
        if net > worth and (left is None or tokens <= left):
            worth = net
            best = Plan(option, seen.confidence, seen.posterior, gain, tokens, price)
    return best


def _hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The upper concave hull of points that ascend."""
    hull: list[tuple[float, float]] = []
    for point in points:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(one: tuple[float, float], other: tuple[float, float]) -> float:
    return (other[1] - one[1]) / (other[0] - one[0])


def _sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-max(-500.0, min(500.0, logit))))
