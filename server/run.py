"""One request's life: a strategy on a problem, with its engine, budget, answers and trace."""

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from server.trace import Trace, Usage
from strategies.core.answers import Answers
from strategies.core.budget import Budget, Limits
from strategies.core.context import Context, Verifier
from strategies.core.engine import Engine
from strategies.core.events import Event
from strategies.core.sandbox import Sandbox
from strategies.core.strategy import Strategy
from strategies.core.types import Outcome, Problem


class Run:
    """A strategy at work on one problem. `outcome` is set once it is over."""

    def __init__(
        self,
        selection: "Selection",
        problem: Problem,
        engine: Engine,
        sandbox: Sandbox,
        answers: Answers,
        listen: Callable[[Event], None],
    ) -> None:
        self.id = f"run-{uuid.uuid4().hex}"
        self.trace = Trace()
        self.outcome: Outcome | None = None
        self._strategy = selection.strategy
        self._problem = problem
        self._listen = listen
        self._context = Context(
            engine=engine,
            budget=Budget(selection.limits),
            answers=answers,
            sandbox=sandbox,
            emit=self._emit,
            verifier=selection.verifier,
            answer_format=selection.strategy.answer,
        )

    async def solve(self) -> Outcome:
        """Search to the end."""
        self.outcome = await self._strategy.solve(self._problem, self._context)
        return self.outcome

    def usage(self) -> Usage:
        """What the run has spent so far, by fate."""
        return self.trace.usage(self.outcome.chosen.index if self.outcome else None)

    def _emit(self, event: Event) -> None:
        self.trace.record(event)
        self._listen(event)


@dataclass(slots=True)
class Selection:
    """What a request chose, and the runs that came of it."""

    strategy: Strategy
    limits: Limits
    verifier: Verifier | None
    question: str = ""
    """The question in the client's own words, for verifiers that read it."""
    runs: list[Run] = field(default_factory=list[Run])
