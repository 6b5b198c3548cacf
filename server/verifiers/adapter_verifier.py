"""A LoRA adapter on the same engine as a verifier of steps."""

from collections.abc import Collection, Sequence
from math import exp
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from strategies.core.errors import VerifierFailed
from strategies.core.types import Candidate, Combine, Problem, Verdict, combined

if TYPE_CHECKING:
    from strategies.core.context import Context


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
        default="min", description="How the scores of steps make the score of a whole answer."
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
        labels = await ctx.engine.labels(self.adapter)
        ends = await ctx.engine.tokens_with(labels.delimiter)
        lengths = [_steps(candidate, ends) for candidate in candidates]
        prefixes = [
            problem.token_ids + candidate.token_ids[:length]
            for candidate, of_it in zip(candidates, lengths, strict=True)
            for length in of_it
        ]
        likely = await ctx.read(prefixes, (labels.good, labels.bad), adapter=self.adapter)
        scores = iter([1 / (1 + exp(min(700.0, bad - good))) for good, bad in likely])
        verdicts: list[Verdict] = []
        for of_it in lengths:
            steps = tuple(next(scores) for _ in of_it)
            verdicts.append(Verdict(score=combined(steps, self.over), steps=steps))
        return verdicts


def _steps(candidate: Candidate, ends: Collection[int]) -> list[int]:
    """How many tokens of a candidate there are at the end of each step; its end ends one, too."""
    if not candidate.token_ids:
        raise VerifierFailed(f"candidate {candidate.index} has no token to judge")
    lengths = [at for at, token in enumerate(candidate.token_ids, start=1) if token in ends]
    whole = len(candidate.token_ids)
    return lengths if lengths and lengths[-1] == whole else [*lengths, whole]
