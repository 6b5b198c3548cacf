"""The values that pass between strategies, engines and verifiers; all frozen."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, prod
from typing import Literal

FinishReason = Literal["stop", "length", "repetition", "abort", "step"]
"""Why a sequence ended. `step`: at the end of a step, from where it may go on."""

StopReason = Literal["decided", "exhausted", "deadline", "samples", "cancelled"]
"""Why a run ended.

The rule was satisfied early, the tokens ran out, the time ran out, all samples were drawn, or the
client went away.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What to answer.

    The prompt as the model reads it, and what the client asked of each sample.
    """

    token_ids: tuple[int, ...]
    text: str = ""
    """The prompt in words, for verifiers that read it."""
    max_tokens: int = 256
    """Generated tokens allowed to one sample."""
    seed: int | None = None
    """Makes the run repeatable: sample `i` is drawn with `seed + i`."""
    answers: int = 1
    """How many distinct answers the client wants, best first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One sequence asked of an engine."""

    index: int
    """Its number within the run, from 0."""
    token_ids: tuple[int, ...]
    """The prompt and whatever of the answer it continues."""
    max_tokens: int
    continues: int | None = None
    """The number of the sequence that `token_ids` ends with, if it goes on with one."""
    seed: int | None = None
    greedy: bool = False
    """Whether each token is the likeliest, whatever the client asked for."""
    until: str | None = None
    """Ends the sequence, with reason `step`, after the token in which this delimiter is whole."""
    logprobs: int | None = None
    """None: none; 0: of the chosen tokens; k: of the k most likely tokens as well."""
    adapter: str | None = None
    """A LoRA adapter by name; None is what the client named."""
    labels: tuple[int, ...] = ()
    """With any, the one token generated does not matter: what counts is how likely these are."""
    choices: tuple[str, ...] = ()
    """With any, the text is one of these."""
    piecewise: bool = False
    """Whether each token is wanted as soon as it is there."""
    apart: bool = False
    """Whether it is no part of an answer, and so not subject to the client's parameters."""
    priority: int = 0
    """Lower runs first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


def filled(prompt: str, **places: str) -> str:
    """A prompt with each `{place}` filled; what fills them is not looked into."""
    pattern = re.compile("|".join(f"{{{name}}}" for name in places))
    return pattern.sub(lambda found: places[found.group()[1:-1]], prompt)


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """How an adapter says what it thinks of a step: with the next token after it."""

    good: int
    """The id of the token that says that all is right so far."""
    bad: int
    delimiter: str = "\n"
    """Ends a step."""
    opening: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    """The tokens that end a prompt which is to be answered, and those it reads in their place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A piece of a sequence, in order; the last one carries `finish_reason`."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    """Of the chosen tokens, in nats; as long as `token_ids` if anybody asked for it, else empty."""
    pieces: tuple[str, ...] = ()
    """Each token in words; as long as `logprobs`."""
    top_logprobs: tuple[tuple[float, ...], ...] = ()
    """Per token, of the k most likely tokens; empty unless k > 0 was asked for."""
    top_token_ids: tuple[tuple[int, ...], ...] = ()
    """Which tokens these are."""
    label_logprobs: tuple[float, ...] = ()
    """Of the labels asked for as the next token, in nats."""
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """How many of the prompt's tokens came from the prefix cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A solution with the answer read from it; one that ended with a step may go on.

    It is all of the solution, though its last sequence may have written its last step only.
    """

    index: int
    """Of its last sequence."""
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    parent: int | None = None
    """The candidate that its last sequence goes on with."""
    inherited: int = 0
    """How many of its tokens are the parent's."""
    inherited_chars: int = 0
    """How much of its text is."""
    answer: str | None = None
    """The extracted answer in canonical form; None if there is none."""
    model: str | None = None
    """The adapter that wrote it, by name; None is what the client named."""
    logprobs: tuple[float, ...] = ()
    pieces: tuple[str, ...] = ()
    top_logprobs: tuple[tuple[float, ...], ...] = ()
    top_token_ids: tuple[tuple[int, ...], ...] = ()
    prompt_tokens: int = 0
    """Of the last sequence, whose prompt includes what it goes on with."""
    cached_tokens: int = 0

    @property
    def drawn(self) -> int:
        """Tokens that its last sequence generated."""
        return len(self.token_ids) - self.inherited

    @property
    def likelihood(self) -> float | None:
        """The geometric mean probability of its tokens; None where nobody asked for it."""
        if not self.logprobs:
            return None
        return exp(min(0.0, sum(self.logprobs) / len(self.logprobs)))

    @property
    def complete(self) -> bool:
        """Whether the model ended it itself, rather than a limit."""
        return self.finish_reason == "stop"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A sample as its model's server reads it."""

    call: str | None
    """The tool calls in one spelling, if there are any: they are the answer."""
    content: str
    """The text without reasoning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A verifier's opinion of one candidate."""

    score: float
    """In [0, 1]; higher is better."""
    steps: tuple[float, ...] = ()
    """Per step, in [0, 1], where the verifier has them."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.score <= 1.0:  # also refuses NaN
            raise ValueError(f"a score must be in [0, 1], not {self.score}")


Combine = Literal["last", "min", "mean", "product"]
"""How the scores of steps make the score of a solution."""


def combined(steps: Sequence[float], how: Combine) -> float:
    """One score of several, of which there is at least one."""
    match how:
        case "last":
            return steps[-1]
        case "min":
            return min(steps)
        case "mean":
            return sum(steps) / len(steps)
        case "product":
            return prod(steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The chosen candidate, all that were finished, and why the run ended."""

    chosen: Candidate
    candidates: tuple[Candidate, ...]
    stopped: StopReason
    ranked: tuple[Candidate, ...]
    """The best candidate of each distinct answer, best first, as many as were asked for."""
    scores: Mapping[int, float] = field(default_factory=dict[int, float])
    """By candidate index, where a verifier judged; else what a search by likelihood went by."""
    votes: Mapping[str, float] = field(default_factory=dict[str, float])
    """By answer, where there was a vote."""
    confidence: float | None = None
    """The probability that the vote's winner stays the winner, where the rule estimates one.

    Of a calibrated strategy, the probability that the answer is right.
    """
    abstained: bool = False
    """Whether that is less than the client asked for."""
