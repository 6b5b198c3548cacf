"""A strategy on a problem, from admission to the stored trace, whoever runs the engine."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Generic, TypeVar

from starlette.types import Scope

from server.admission import Admission
from server.endpoints import Asking, Endpoints
from server.keys.accounts import TAB
from server.run import Run, Selection
from server.store import Store
from server.tracing import below, call
from server.verifiers.catalogue import adapters
from strategies.core.aio import Background
from strategies.core.answers import Answers
from strategies.core.engine import Engine
from strategies.core.errors import InvalidRequest
from strategies.core.events import Committed, Event, Grown
from strategies.core.sandbox import Sandbox
from strategies.core.types import Outcome, Problem

T = TypeVar("T")

_COUNTED: dict[str, Any] = {
    "min_tokens": 0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "structured_outputs": None,
    "repetition_detection": None,
    "thinking_token_budget": None,
    "stop": [],
}
"""What vLLM keeps count of within one sequence, with the value that asks for nothing."""


class Winner(Generic[T]):
    """What a stream is told of a run: the sequence that wins, from the moment that it must."""

    def __init__(self, *, whole: Callable[[int], T | None], grown: Callable[[Grown], T]) -> None:
        """`whole` is what there is of a sequence so far, `grown` its next piece."""
        self._whole = whole
        self._grown = grown
        self._index: int | None = None

    def __call__(self, event: Event) -> T | None:
        """What is to be told now."""
        match event:
            case Committed(index=index) if self._index is None:
                self._index = index
                return self._whole(index)
            case Grown(index=index) if index == self._index:
                return self._grown(event)
            case _:
                return None


@asynccontextmanager
async def entered(selection: Selection, scope: Scope) -> AsyncGenerator[None]:
    """Charge a request to its key, and count it: until its run ends, or the block without a run.

    Before anything reads its prompt, so that a crowd is refused at the least cost.

    Raises:
        Busy: Too many requests are under way already.
    """
    selection.tab = scope.get(TAB)
    admission: Admission = scope["app"].state.admission
    admission.check()
    with selection.held as held:
        selection.place = held.enter_context(admission.enter(selection.tab))
        held.callback(setattr, selection, "place", None)
        yield


class Searches:
    """What all runs of a server share."""

    def __init__(
        self,
        *,
        admission: Admission,
        store: Store,
        sandbox: Sandbox,
        remote: Endpoints,
        traced: bool = False,
    ) -> None:
        """`traced` is whether runs become spans."""
        self._admission = admission
        self._store = store
        self._sandbox = sandbox
        self._answers = Answers(sandbox)
        self._remote = remote
        self._traced = traced

    def check(self, selection: Selection) -> None:
        """Refuse one more run while too many requests are under way; see `Admission.check`.

        Not the first run of a request that is counted since it came, or of a batch.
        """
        if selection.place is None:
            self._admission.check()

    async def run(
        self,
        selection: Selection,
        problem: Problem,
        engine: Engine,
        *,
        name: str,
        tell: Callable[[Event], T | None] | None = None,
    ) -> AsyncGenerator[T | Outcome, None]:
        """Run the strategy; yield what `tell` makes of events as they happen, then the outcome."""
        heard: asyncio.Queue[T | None] = asyncio.Queue()

        def listen(event: Event) -> None:
            if tell is not None and (piece := tell(event)) is not None:
                heard.put_nowait(piece)

        def headers(index: int) -> Mapping[str, str]:
            parent = selection.traceparent if self._traced else None
            return {} if parent is None else below(parent, call(name, index))

        with (
            selection.held.pop_all(),
            self._admission.admit(engine, selection.place, selection.tab) as admitted,
        ):
            run = Run(
                selection,
                problem,
                admitted,
                self._sandbox,
                self._answers,
                listen,
                name,
                remote=Asking(self._remote, headers),
            )
            selection.begin(run)
            with self._store.keeping(run):
                async with Background(run.solve()) as solving:
                    solving.add_done_callback(lambda _: heard.put_nowait(None))
                    while (piece := await heard.get()) is not None:
                        yield piece
                    outcome = await solving
        yield outcome


def searches_steps(selection: Selection) -> bool:
    """Whether solutions are drawn in parts."""
    known = selection.calibration
    return selection.strategy.stepwise or (known is not None and bool(known.searches))


def check_fields(
    selection: Selection, asked: Callable[[str], object], *, tokens: bool, logprobs: bool
) -> None:
    """Refuse what the strategy cannot obey in a request whose sampling fields `asked` looks up.

    `tokens` is whether the prompt is nothing but tokens.

    Raises:
        InvalidRequest: There is such a field; it is named.
    """
    strategy, stepwise = selection.strategy, searches_steps(selection)
    reads = "the adapter" if adapters(selection.verifier) else None
    goes_on = strategy.kind if stepwise or strategy.rereads else reads
    if goes_on is not None and not tokens:
        raise InvalidRequest(
            f"{goes_on} goes on from tokens, and a picture or a sound has none", field="messages"
        )
    if stepwise:
        for field, idle in _COUNTED.items():
            if asked(field) not in (None, idle):
                raise InvalidRequest(
                    f"'{field}' is kept over a whole answer, and {strategy.kind} draws it in "
                    "parts: drop one of them",
                    field=field,
                )
    if logprobs and not strategy.scores_tokens():
        raise InvalidRequest(
            f"{strategy.kind} writes answers that have no log-probabilities of their own",
            field="logprobs",
        )
