"""A LoRA adapter on the same engine as a verifier of steps."""

from collections.abc import Collection, Sequence
from math import exp
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from strategies.core.errors import VerifierFailed
from strategies.core.types import Candidate, Combine, Labels, Problem, Verdict, combined

if TYPE_CHECKING:
    from strategies.core.context import Context


MOST_STEPS = 512
"""Of one candidate."""


class AdapterVerifier(BaseModel):
    """P(good) after each step, by a LoRA adapter on the model that answers (Lightman et al. 2023).

    It reads the prompt and the steps so far, and says a label with its next token; the score is the
    probability of the good label against the bad one. All steps are read at once, each for one
    token, and what was read before in the same search costs nothing. Tokens set aside for it: a
    ninth of a sample's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["adapter"] = "adapter"
    adapter: str = Field(
        min_length=1, max_length=200, description="A served adapter with labels in its manifest."
    )
    over: Combine = Field(
        default="min",
        description="How the scores of steps make that of a whole answer, where it is judged "
        "as a whole; step-wise searches have a `score` of their own.",
    )

    @property
    def logprobs(self) -> None:
        """None: it reads the tokens themselves."""
        return None

    @property
    def stepwise(self) -> bool:
        """It judges each step."""
        return True

    def aside(self, tokens: int) -> int:
        """Steps have eight tokens and more, as a rule."""
        return max(1, tokens // 9)

    async def judge(
        self, problem: Problem, candidates: Sequence[Candidate], ctx: "Context"
    ) -> list[Verdict]:
        """One score per candidate, made of one per step."""
        labels = ctx.engine.labels(self.adapter)
        ends = await ctx.engine.tokens_with(labels.delimiter)
        prompt = _read_by(labels, problem.token_ids)
        paths = [
            (prompt + candidate.token_ids, _places(prompt, candidate, ends, ctx))
            for candidate in candidates
        ]
        likely = await ctx.read(paths, (labels.good, labels.bad), adapter=self.adapter)
        verdicts: list[Verdict] = []
        for rows in likely:
            steps = tuple(1 / (1 + exp(min(700.0, bad - good))) for good, bad in rows)
            verdicts.append(Verdict(score=combined(steps, self.over), steps=steps))
        return verdicts


def _read_by(labels: Labels, prompt: tuple[int, ...]) -> tuple[int, ...]:
    """The prompt as the adapter reads it."""
    if labels.opening is None:
        return prompt
    answers, verdicts = labels.opening
    if prompt[-len(answers) :] != answers:
        raise VerifierFailed(
            "the prompt does not end with the opening of an answer that the adapter's manifest "
            "names; it judges answers to chat messages only"
        )
    return prompt[: -len(answers)] + verdicts


def _places(
    prompt: Sequence[int], candidate: Candidate, ends: Collection[int], ctx: "Context"
) -> list[int]:
    """How many tokens there are at the end of each step; the end of all ends one, too.

    An end that leaves the model no room to say anything is not asked about.
    """
    tokens, before = candidate.token_ids, len(prompt)
    places = [before + at for at, token in enumerate(tokens, start=1) if token in ends]
    if not places or places[-1] != before + len(tokens):
        places.append(before + len(tokens))
    places = [place for place in places if before < place <= ctx.engine.longest]
    if not places:
        raise VerifierFailed(f"candidate {candidate.index} has no step that could be judged")
    if len(places) > MOST_STEPS:
        raise VerifierFailed(
            f"candidate {candidate.index} has {len(places)} steps; {MOST_STEPS} are judged at most"
        )
    return places
