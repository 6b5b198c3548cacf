"""Beam search over tokens, without an engine: hypotheses, their scores, and when it is over."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Hypothesis:
    """A continuation of the prompt, and its log-probability in nats."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    origin: int | None = None
    """Whoever grows it keeps here which call its last token came from."""

    @property
    def logprob(self) -> float:
        """Of all its tokens together."""
        return sum(self.logprobs)


@dataclass(slots=True, kw_only=True)
class Hypotheses:
    """The `width` best running and the `width` best finished hypotheses.

    It agrees with `transformers`: a round looks at as many best extensions as could all end and
    leave `width` that run, `2 * width` with one token that ends. Those of the first `width` that
    end are finished, and the best others run on. It is over when `width` are finished and the best
    that runs scores no more than the worst of them, or at `longest`.
    """

    width: int
    length_penalty: float
    ends: Collection[int]
    """Tokens that end a hypothesis."""
    longest: int
    """Tokens of a hypothesis at most."""
    running: list[Hypothesis] = field(default_factory=lambda: [Hypothesis()])
    finished: list[Hypothesis] = field(default_factory=list[Hypothesis])
    """Best first."""

    def extend(
        self, likeliest: Sequence[Sequence[tuple[int, float]]], calls: Sequence[int]
    ) -> None:
        """One round: the `2 * width` likeliest next tokens of each running hypothesis.

        Each is (token id, log-probability); `calls` says where those of a hypothesis came from.
        """
        extensions = [
            Hypothesis(
                token_ids=(*one.token_ids, token),
                logprobs=(*one.logprobs, logprob),
                origin=call,
            )
            for one, tokens, call in zip(self.running, likeliest, calls, strict=True)
            for token, logprob in tokens
        ]
        extensions.sort(key=lambda one: -one.logprob)
        best = extensions[: (1 + len(self.ends)) * self.width]
        ended = [
            len(one.token_ids) >= self.longest or one.token_ids[-1] in self.ends for one in best
        ]
        self.running = [one for one, end in zip(best, ended, strict=True) if not end][: self.width]
        self.finished += [one for one, end in zip(best[: self.width], ended, strict=False) if end]
        self.finished.sort(key=lambda one: -self.score(one))
        del self.finished[self.width :]

    @property
    def over(self) -> bool:
        """Whether nothing that runs can still matter."""
        if not self.running:
            return True
        if len(self.finished) < self.width:
            return False
        return self.score(self.running[0]) <= self.score(self.finished[-1])

    def score(self, one: Hypothesis) -> float:
        """Its log-probability over its length to the power of the penalty (Wu et al. 2016)."""
        return one.logprob / max(1, len(one.token_ids)) ** self.length_penalty
