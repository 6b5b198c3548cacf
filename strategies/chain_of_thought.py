"""Chain of thought: one sample that reasons before it answers (Wei et al. 2022)."""

from typing import ClassVar, Literal

from pydantic import Field

from strategies.core.context import Context
from strategies.core.strategy import Example, Strategy
from strategies.core.types import Outcome, Problem


class ChainOfThought(Strategy, frozen=True):
    """One sample, streamed as it is written.

    `examples` are worked problems put before the question (few-shot, Wei et al. 2022); `trigger` is
    put after it (zero-shot, Kojima et al. 2022: "Let's think step by step.").
    """

    cost: ClassVar[str] = "one sample"
    paper: ClassVar[str] = (
        "Wei et al. 2022, Chain-of-Thought Prompting Elicits Reasoning, arXiv:2201.11903; "
        "Kojima et al. 2022, Large Language Models are Zero-Shot Reasoners, arXiv:2205.11916"
    )

    kind: Literal["chain_of_thought"] = "chain_of_thought"
    trigger: str | None = Field(
        default=None, min_length=1, max_length=2_000, description="Words after the question."
    )
    examples: tuple[Example, ...] = Field(
        default=(), max_length=32, description="Worked problems before it."
    )

    async def solve(self, problem: Problem, ctx: Context) -> Outcome:
        """Sample once."""
        async with ctx.sampling(problem, 1) as arrivals:
            ctx.commit(0)
            candidate = await anext(arrivals)
        return await ctx.choose(problem, [candidate])

    def examples_shown(self) -> tuple[Example, ...]:
        """The worked problems."""
        return self.examples

    def trigger_shown(self) -> str | None:
        """The words after the question."""
        return self.trigger
