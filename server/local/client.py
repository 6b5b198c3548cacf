"""An engine's `generate()` that searches, and gives the winner as its one output.

Every endpoint of vLLM gains every strategy by this one seam; a request that names none is not
touched.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

from vllm.inputs import EngineInput
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from server.local.engine import Asked, Generate, LocalEngine, twin
from server.run import Run, Selection
from server.selection import SELECTION
from strategies.core.aio import Background
from strategies.core.answers import Answers
from strategies.core.errors import InvalidRequest
from strategies.core.events import Committed, Event, Grown
from strategies.core.sandbox import Sandbox
from strategies.core.types import Problem


class Reasoner:
    """A `generate` in place of the engine's own."""

    def __init__(
        self,
        generate: Generate,
        *,
        sandbox: Sandbox,
        answers: Answers,
        adapter: Callable[[str], LoRARequest],
    ) -> None:
        self._inner = generate
        self._sandbox = sandbox
        self._answers = answers
        self._adapter = adapter

    def __call__(
        self, prompt: EngineInput, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """As `EngineClient.generate`."""
        selection = SELECTION.get()
        if selection is None:
            return self._inner(prompt, sampling_params, request_id, **options)
        asked = Asked(prompt=prompt, params=sampling_params, request_id=request_id, options=options)
        return self._search(selection, asked)

    async def _search(
        self, selection: Selection, asked: Asked
    ) -> AsyncGenerator[RequestOutput, None]:
        """Run the strategy.

        A stream gets the winner's pieces from the moment that nothing else can win.
        """
        problem = _problem(asked, selection.question)
        engine = LocalEngine(self._inner, asked, self._adapter)
        streaming = asked.params.output_kind is RequestOutputKind.DELTA
        heard: asyncio.Queue[RequestOutput | None] = asyncio.Queue()
        committed: int | None = None

        def listen(event: Event) -> None:
            nonlocal committed
            match event:
                case Committed(index=index) if streaming and committed is None:
                    committed = index
                    if index in engine.outputs:
                        heard.put_nowait(twin(engine.outputs[index]))
                case Grown(index=index) if index == committed:
                    heard.put_nowait(engine.latest[index])
                case _:
                    pass

        run = Run(selection, problem, engine, self._sandbox, self._answers, listen)
        selection.runs.append(run)
        async with Background(run.solve()) as solving:
            solving.add_done_callback(lambda _: heard.put_nowait(None))
            ended = False
            while (piece := await heard.get()) is not None:
                ended = piece.finished
                yield _as(piece, asked)
            outcome = await solving
        if not ended:
            last = twin(engine.outputs[outcome.chosen.index])
            if committed is not None:  # its pieces are with the client; a deadline cut off the end
                last.outputs[0].text, last.outputs[0].token_ids, last.outputs[0].logprobs = (
                    "",
                    [],
                    None,
                )
            yield _as(last, asked, finish=outcome.chosen.finish_reason)


def _problem(asked: Asked, question: str) -> Problem:
    ids = asked.prompt.get("prompt_token_ids")
    if not ids:
        raise InvalidRequest("a strategy needs a prompt of tokens")
    return Problem(
        token_ids=tuple(ids),  # pyright: ignore[reportArgumentType, reportUnknownArgumentType]
        text=question,
        max_tokens=asked.params.max_tokens or 16,
        seed=asked.params.seed,
    )


def _as(piece: RequestOutput, asked: Asked, *, finish: str | None = None) -> RequestOutput:
    """Dress a sample's output as the output of the request that the client made."""
    piece.request_id = asked.request_id
    if finish is not None:
        piece.finished = True
        piece.outputs[0].finish_reason = finish
    if asked.params.logprobs is None:
        piece.outputs[0].logprobs = None
        piece.outputs[0].cumulative_logprob = None
    return piece
