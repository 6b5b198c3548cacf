"""Answers that somebody wrote, to be judged: what `POST /v1/verify` runs."""

from typing import ClassVar, Literal

from strategies.core.context import Context
from strategies.core.errors import InvalidRequest
from strategies.core.strategy import Strategy, VerifierChoice
from strategies.core.types import Candidate, Outcome, Problem


class Given(Strategy, frozen=True):
    """Draws nothing: judges these texts, all at once. It is no strategy that a request can name."""

    cost: ClassVar[str] = "one batched verification"
    paper: ClassVar[str] = ""

    kind: Literal["given"] = "given"
    texts: tuple[str, ...]
    complete: bool
    """Whether each is a whole answer, which ends where the model would end it."""
    verifier: VerifierChoice

    def most(self) -> int:
        """As many as there are."""
        return len(self.texts)

    def judged_by(self) -> VerifierChoice:
        """The verifier that was asked for."""
        return self.verifier

    def judges_together(self) -> bool:
        """All of them."""
        return True

    def scores_tokens(self) -> bool:
        """Nothing of it was drawn."""
        return False

    async def solve(self, problem: Problem, ctx: Context) -> Outcome:
        """Judge."""
        end = ctx.engine.ends[0]
        candidates: list[Candidate] = []
        for text in self.texts:
            ids = await ctx.engine.encode(text)
            if len(problem.token_ids) + len(ids) >= ctx.engine.longest:
                raise InvalidRequest(
                    f"with the question, the candidate has {len(problem.token_ids) + len(ids)} "
                    f"tokens; the model reads {ctx.engine.longest}",
                    field=f"candidates.{len(candidates)}",
                )
            candidates.append(
                Candidate(
                    index=ctx.number(),
                    text=text,
                    token_ids=(*ids, end) if self.complete else ids,
                    finish_reason="stop" if self.complete else "step",
                    answer=await ctx.answer(text, ids),
                )
            )
        verdicts = await ctx.verify(problem, candidates)
        scores = {
            one.index: verdict.score for one, verdict in zip(candidates, verdicts, strict=True)
        }
        best_first = sorted(candidates, key=lambda one: (-scores[one.index], one.index))
        return await ctx.choose(problem, best_first, scores=scores)
