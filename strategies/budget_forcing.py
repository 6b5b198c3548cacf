"""Budget forcing: make the model think longer, or stop thinking (s1, Muennighoff et al. 2025)."""

from dataclasses import replace
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from strategies.core.context import Context, Draw, Sampling
from strategies.core.errors import InvalidRequest, NoCandidate
from strategies.core.strategy import Strategy
from strategies.core.types import Candidate, Outcome, Problem


class BudgetForcing(Strategy, frozen=True):
    """One sample whose thinking, which is all before `end`, is held to a length.

    Where the model writes `end` too early, that is taken back and `wait` put in its place, so that
    it thinks again: `extend` times, or as often only as there are fewer than `min_thinking_tokens`.
    At `max_thinking_tokens`, `end` and `cue` are put in, and the answer follows. Tokens that are
    put in count as thinking and in `max_tokens`, not in the budget. Nothing is chosen, so there are
    no ties.

    For a model that does not open its thinking itself, `start` does. One that ends without `end`
    has thought only: that end is taken back alike, and the last one stands. So `end` may be any
    words that begin an answer.
    """

    cost: ClassVar[str] = "one sample, in at most extend + 2 parts that go on with each other"
    paper: ClassVar[str] = "Muennighoff et al. 2025, s1: Simple Test-Time Scaling, arXiv:2501.19393"
    stepwise: ClassVar[bool] = True

    kind: Literal["budget_forcing"] = "budget_forcing"
    start: str | None = Field(
        default=None, min_length=1, max_length=200, description="Put before the thinking."
    )
    end: str = Field(
        default="</think>", min_length=1, max_length=32, description="Ends the thinking."
    )
    wait: str = Field(
        default="Wait", min_length=1, max_length=200, description="Put in place of an early end."
    )
    extend: int = Field(default=1, ge=0, le=32, description="Ends that are taken back at most.")
    min_thinking_tokens: int | None = Field(
        default=None, ge=1, le=131_072, description="Only an end before so many is taken back."
    )
    max_thinking_tokens: int | None = Field(
        default=None, ge=1, le=131_072, description="Ends the thinking by force."
    )
    cue: str | None = Field(
        default=None,
        min_length=1,
        max_length=200,
        description="Put after an end by force, such as `Final Answer:`.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        least, most = self.min_thinking_tokens, self.max_thinking_tokens
        if least is not None and self.extend == 0:
            raise ValueError("'min_thinking_tokens' needs 'extend'")
        if least is not None and most is not None and least > most:
            raise ValueError("'min_thinking_tokens' is more than 'max_thinking_tokens'")
        if self.cue is not None and most is None:
            raise ValueError("'cue' needs 'max_thinking_tokens'")
        return self

    def scores_tokens(self) -> bool:
        """Some were put in."""
        return False

    async def solve(self, problem: Problem, ctx: Context) -> Outcome:
        """Think, think again, then answer."""
        try:
            await ctx.engine.tokens_with(self.end)
        except InvalidRequest as error:
            raise InvalidRequest(str(error), field="strategy.end") from error
        most = min(problem.max_tokens, self.max_thinking_tokens or problem.max_tokens)
        before: Candidate | None = None
        if self.start is not None:
            before = await ctx.put(None, self.start, below=most)
            if before is None:
                raise InvalidRequest("'start' leaves no room to think", field="strategy.start")
        thought: Candidate | None = None
        async with ctx.sampling(problem, 0) as drawing:
            for left in range(self.extend, -1, -1):
                written = 0 if before is None else len(before.token_ids)
                draw = Draw(after=before, until=self.end, max_tokens=most - written)
                [drawn] = await drawing.finish([draw])
                if drawn is None:
                    break
                thought = drawn
                before = await self._reopened(thought, ctx, below=most) if left else None
                if before is None:
                    break
            if thought is None:
                raise NoCandidate("the budget ran out before the thinking had a single token")
            best = await self._answered(thought, problem, ctx, drawing)
        return await ctx.choose(problem, [best])

    async def _reopened(self, thought: Candidate, ctx: Context, *, below: int) -> Candidate | None:
        """The thinking without its end, and `wait` after it; None if it is to stay as it is."""
        if thought.finish_reason == "stop" and thought.token_ids[-1:] == ctx.engine.ends[:1]:
            ids, text = thought.token_ids[:-1], thought.text
        elif thought.finish_reason == "step" and await self._closed(thought, ctx):
            ids, text = await self._before_end(thought, ctx)
        else:
            return None
        if self.min_thinking_tokens is not None and len(ids) >= self.min_thinking_tokens:
            return None
        return await ctx.put(replace(thought, token_ids=ids, text=text), self.wait, below=below)

    async def _closed(self, thought: Candidate, ctx: Context) -> bool:
        """Whether it was the model that ended a part, rather than its length."""
        own = thought.text[thought.inherited_chars :]
        return self.end in own or thought.token_ids[-1] in await ctx.engine.tokens_with(self.end)

    async def _before_end(self, thought: Candidate, ctx: Context) -> tuple[tuple[int, ...], str]:
        """The tokens before `end`, and their words.

        Of a token that `end` begins within, the words before it are tokenised anew.
        """
        ids, text = thought.token_ids, thought.text
        at = text.rfind(self.end)
        if at < 0:  # the tag is one of the special tokens, which are not spelled
            return ids[:-1], text
        kept, words = len(ids), text
        while kept > thought.inherited and len(words) > at:
            kept -= 1
            words = await ctx.engine.decode(ids[:kept])
        rest = text[len(words) : at]
        return ids[:kept] + (await ctx.engine.encode(rest) if rest else ()), text[:at]

    async def _answered(
        self, thought: Candidate, problem: Problem, ctx: Context, drawing: Sampling
    ) -> Candidate:
        """The thinking with an answer after it, if that is still to come and there is room."""
        if thought.finish_reason != "step":
            return thought
        before: Candidate | None = thought
        if not await self._closed(thought, ctx):
            before = await ctx.put(thought, self.end + (self.cue or ""), below=problem.max_tokens)
        [answer] = [None] if before is None else await drawing.finish([Draw(after=before)])
        if answer is not None:
            return answer
        said = await ctx.answer(thought.text, thought.token_ids)
        return replace(thought, finish_reason="length", answer=said)
