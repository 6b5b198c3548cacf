"""One request's life: a strategy on a problem, with its engine, budget, answers and trace."""

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

from server.admission import Place
from server.keys.accounts import Tab
from server.trace import Detail, Trace, Usage
from server.wire import JSON
from strategies.core.answers import Answers
from strategies.core.budget import Budget, Limits
from strategies.core.calibration import Calibration
from strategies.core.context import Context, Reader, Verifier
from strategies.core.engine import Engine, Remote
from strategies.core.errors import MullError
from strategies.core.events import Event, Failed
from strategies.core.market import Bidder
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
        name: str,
        remote: Remote | None = None,
    ) -> None:
        self.id = name
        self.selection = selection
        self.trace = Trace()
        self.outcome: Outcome | None = None
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
            read=selection.read,
            remote=remote,
            calibration=selection.calibration,
            bidder=selection.bidder,
        )

    async def solve(self) -> Outcome:
        """Search to the end."""
        context = self._context
        try:
            bidder = context.bidder
            if bidder is not None and (bidder.equal or context.calibration is None):
                context.budget, context.bidder = await bidder.share(), None
            outcome = await self.selection.strategy.solve(self._problem, context)
        except asyncio.CancelledError:
            self._emit(Failed(stopped="cancelled"))
            raise
        except MullError as error:
            self._emit(Failed(stopped="error", error=str(error)))
            raise
        except BaseException as error:
            self._emit(Failed(stopped="error", error=type(error).__name__))
            raise
        finally:  # a trace is kept; all that the engine put out would make collecting garbage slow
            del self._context, self._listen
        self.outcome = outcome
        return outcome

    def usage(self) -> Usage:
        """What the run has spent so far, by fate."""
        return self.trace.usage()

    def _emit(self, event: Event) -> None:
        self.trace.record(event)
        self._listen(event)


@dataclass(slots=True, kw_only=True)
class Selection:
    """What a request chose, who asked, and the runs that came of it."""

    strategy: Strategy
    limits: Limits
    verifier: Verifier | None
    question: str = ""
    """The question in the client's own words, for verifiers that read it."""
    conversation: list[JSON] | str | None = None
    """What was asked, as it could be asked again; None where it is not words alone."""
    model: str | None = None
    """The adapter that answers, by name; None is the base."""
    stored: bool = True
    """Whether the run may be kept on disk; clients say `store: false`."""
    trace: Detail | None = None
    """How much of what happened the reply is to show."""
    owner: str = ""
    """A digest of the key that asked."""
    request_id: str | None = None
    """The client's own name of the request."""
    traceparent: str | None = None
    """The span that the request is, or is made under, as W3C writes it."""
    user: str | None = None
    """Whom the client says it asks for; it stands in the trace."""
    calibration: Calibration | None = None
    """What is known of the model, for strategies that plan."""
    bidder: Bidder | None = None
    """Of a prompt in a batch, who asks for its part of the budget."""
    place: Place | None = None
    """Where the request, or its batch, stands among all; None where it is not counted yet."""
    held: ExitStack = field(default_factory=ExitStack)
    """What counts the request until its run takes that over."""
    tab: Tab | None = None
    """What the request is charged to, where keys are checked."""
    versions: dict[str, str] = field(default_factory=dict[str, str])
    """By the name of an adapter in the strategy, the version that serves this request."""
    read: Reader | None = None
    """How the model's server tells reasoning and tool calls from the answer."""
    runs: list[Run] = field(default_factory=list[Run])
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    """Set with the first run."""

    def begin(self, run: Run) -> None:
        """Put a run on record."""
        self.runs.append(run)
        self.begun.set()
