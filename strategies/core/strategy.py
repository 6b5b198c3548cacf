"""What every strategy is: a frozen value whose fields are its parameters, with one method."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from strategies.core.answers import AnswerFormat
from strategies.core.context import Context
from strategies.core.types import Outcome, Problem


class VerifierChoice(BaseModel):
    """A verifier by `kind`, with its own parameters beside it; a plain string is the kind alone.

    Which kinds there are is the server's to know: it resolves the choice before any work.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    kind: str = Field(min_length=1, max_length=100)

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value


class Example(BaseModel):
    """A worked example for the prompt."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    question: str = Field(min_length=1, max_length=20_000)
    answer: str = Field(min_length=1, max_length=20_000)


class Strategy(BaseModel, ABC, frozen=True):
    """A way to spend inference compute on one problem."""

    model_config = ConfigDict(extra="forbid")

    cost: ClassVar[str]
    """What it asks of the engine, in one sentence."""
    paper: ClassVar[str]
    """Authors, year, title, and arXiv number."""
    stepwise: ClassVar[bool] = False
    """Whether it draws an answer in parts, and its verifier, if any, judges parts."""
    rereads: ClassVar[bool] = False
    """Whether it puts more tokens after those of the prompt, which a picture does not have."""

    kind: str
    answer: AnswerFormat = Field(
        default=AnswerFormat(), description="How answers are read and compared."
    )

    @abstractmethod
    async def solve(self, problem: Problem, ctx: Context) -> Outcome:
        """Search for an answer within the context's budget.

        Raises:
            NoCandidate: The budget ran out before one candidate existed.
            VerifierFailed: A verifier that decides had no opinion.
        """

    def most(self) -> int:
        """The most samples that it draws, so the most distinct answers that it can give."""
        return 1

    def judges_together(self) -> bool:
        """Whether its verifier sees all answers at once."""
        return False

    def drawn_from(self) -> tuple[str, ...]:
        """The models that its samples come from, by name; none: what the client named."""
        return ()

    def scores_tokens(self) -> bool:
        """Whether each token of its answers was drawn, and so has a log-probability."""
        return True

    def random(self) -> bool:
        """Whether it draws samples, as the request's sampling parameters say."""
        return True

    def judged_by(self) -> VerifierChoice | None:
        """The verifier that the server must provide, if any."""
        return None

    def examples_shown(self) -> tuple[Example, ...]:
        """Worked examples to put before the question."""
        return ()

    def trigger_shown(self) -> str | None:
        """Words to put after the question."""
        return None
