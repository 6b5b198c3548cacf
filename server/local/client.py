"""An engine's `generate()` that searches, and gives the winner as its one output.

Every endpoint of vLLM gains every strategy by this one seam; a request that names none is not
touched.
"""

import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any, cast

from vllm.inputs import EngineInput
from vllm.logprobs import Logprob
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from server.calibration.shelf import Shelf
from server.local.engine import Adapter, Asked, Client, LocalEngine
from server.local.ranks import Ranks
from server.run import Selection
from server.search import Searches, Winner, check_fields
from server.selection import SELECTION, equip, from_xargs, uncalibrated
from server.settings import Settings
from server.verifiers.catalogue import adapters, talkers
from strategies.core.errors import InvalidRequest
from strategies.core.types import Outcome, Problem


class Reasoner:
    """A `generate` in place of the engine's own."""

    def __init__(
        self,
        client: Client,
        *,
        searches: Searches,
        adapter: "Adapter",
        settings: Settings,
        shelf: Shelf,
        ranks: Ranks,
    ) -> None:
        self._client = client
        self._ranks = ranks
        self._searches = searches
        self._adapter = adapter
        self._settings = settings
        self._shelf = shelf

    def __call__(
        self, prompt: EngineInput, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """As `EngineClient.generate`."""
        selection = SELECTION.get()
        if selection is None and sampling_params.extra_args:
            selection = from_xargs(sampling_params.extra_args, self._settings)
            if selection is not None:
                equip(selection, {}, self._shelf, self._settings)
        if selection is None:
            return self._client.generate(prompt, sampling_params, request_id, **options)
        lora = options.get("lora_request")
        selection.model = None if lora is None else lora.lora_name
        known = selection.calibration
        if known is not None and known.digests.get("adapter") != selection.model:
            uncalibrated(selection)  # it is of another version
        versions = selection.versions
        for name in adapters(selection.verifier):
            self._client.judges.labels(versions.get(name, name))  # it is there and judges
        for name in talkers(selection.verifier):
            self._adapter(versions.get(name, name))
        for name in selection.strategy.drawn_from():
            self._adapter(versions.get(name, name), "strategy.models")
        self._searches.check(selection)  # here, before a stream has sent its status
        asked = Asked(prompt=prompt, params=sampling_params, request_id=request_id, options=options)
        return self._search(selection, asked, _problem(asked, selection))

    async def _search(
        self, selection: Selection, asked: Asked, problem: Problem
    ) -> AsyncGenerator[RequestOutput, None]:
        """Run the strategy.

        A stream gets the winner's pieces from the moment that nothing else can win.
        """
        with self._ranks.home(asked.options) as options:
            at_home = replace(asked, options=options)
            async with aclosing(self._run(selection, at_home, problem)) as pieces:
                async for piece in pieces:
                    yield piece

    async def _run(
        self, selection: Selection, asked: Asked, problem: Problem
    ) -> AsyncGenerator[RequestOutput, None]:
        streaming = asked.params.output_kind is RequestOutputKind.DELTA and problem.answers == 1
        name = f"run-{uuid.uuid4().hex}"
        engine = LocalEngine(
            self._client,
            asked,
            self._adapter,
            name=name,
            pieces=streaming,
            versions=selection.versions,
        )
        winner = Winner[RequestOutput](
            whole=lambda index: engine.whole(index) if index in engine.outputs else None,
            grown=lambda grown: engine.latest[grown.index],
        )
        last: RequestOutput | None = None
        outcome: Outcome | None = None
        running = self._searches.run(
            selection, problem, engine, name=name, tell=winner if streaming else None
        )
        async with aclosing(running) as told:
            async for piece in told:
                if isinstance(piece, Outcome):
                    outcome = piece
                elif piece.finished:
                    last = piece  # said when the run is over, so that its sums are right
                else:
                    yield _as(piece, asked)
        assert outcome is not None
        if last is None:
            last = _whole(engine, outcome)
        for output, candidate in zip(last.outputs, outcome.ranked, strict=True):
            if candidate.finish_reason != "step":  # `length` where a deadline cut it off
                output.finish_reason = candidate.finish_reason
        yield _as(last, asked)


def _whole(engine: LocalEngine, outcome: Outcome) -> RequestOutput:
    """The answers that were asked for, best first, as the one output of the request."""
    whole = engine.answer(outcome.chosen)
    whole.outputs = [engine.answer(one).outputs[0] for one in outcome.ranked]
    for rank, output in enumerate(whole.outputs):
        output.index = rank
    whole.finished = True
    return whole


def _problem(asked: Asked, selection: Selection) -> Problem:
    ids = asked.prompt.get("prompt_token_ids")
    if not ids:
        raise InvalidRequest("a strategy needs a prompt of tokens")
    strategy = selection.strategy
    if asked.params.n > strategy.most():  # on endpoints that our middleware does not read
        raise InvalidRequest(f"{strategy.kind} draws fewer samples", field="n")
    check_fields(
        selection,
        lambda field: getattr(asked.params, field),
        tokens=asked.prompt["type"] == "token",
        logprobs=asked.params.logprobs is not None or bool(asked.params.logprob_token_ids),
    )
    return Problem(
        token_ids=tuple(ids),  # pyright: ignore[reportArgumentType, reportUnknownArgumentType]
        text=selection.question,
        max_tokens=asked.params.max_tokens or 16,
        seed=asked.params.seed,
        answers=asked.params.n,
    )


def _as(piece: RequestOutput, asked: Asked) -> RequestOutput:
    """Dress a sample's output as the output of the request that the client made."""
    piece.request_id = asked.request_id
    wanted, named = asked.params.logprobs, asked.params.logprob_token_ids
    for output in piece.outputs:
        if named:
            continue  # vLLM asks for these alone, and tells them all
        if wanted is None:
            output.logprobs = None
            output.cumulative_logprob = None
        elif output.logprobs and wanted >= 0:
            # The search may have asked for more.
            at_each = cast(list[dict[int, Logprob]], output.logprobs)
            output.logprobs = [
                {one: of for one, of in at.items() if one == token or (of.rank or 0) <= wanted}
                for token, at in zip(output.token_ids, at_each, strict=True)
            ]
    return piece
