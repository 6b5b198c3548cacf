"""A batch at work, with a fake in vLLM's place: what fails alone, what is counted, what is full."""

import uuid
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.admission import Admission
from server.batch.running import Batches
from server.errors import handle
from server.routes import batch
from server.run import Run
from server.selection import SELECTION
from server.settings import Settings
from strategies.core.answers import Answers
from strategies.core.errors import EngineUnavailable, MullError
from strategies.core.sandbox import Sandbox
from strategies.core.testing import FakeEngine
from strategies.core.types import Problem
from tests.strategies.test_calibration import calibration
from tests.strategies.test_compute_optimal import more

PATH = "/v1/strategies/compute_optimal/batch"
TEXTS = {
    "split": [f"The answer is {n}." for n in (1, 2, 3, 3, 3, 3, 3, 3)],
    "sure": ["The answer is 3."] * 8,
}


class Shelf:
    def find(self, model: str):
        return calibration().model_copy(update={"searches": {}, "verifier": None, "stages": more()})


class Chat:
    """Answers by a strategy over a fake engine; a prompt may say what goes wrong."""

    fields = frozenset({"model", "messages", "max_tokens"})

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._sandbox = Sandbox()
        self.searching: list[int] = []

    def read(self, body: dict[str, Any]) -> object:
        return body

    async def complete(self, body: dict[str, Any], raw_request: Any, *, watch: bool):
        selection, words = SELECTION.get(), body["messages"][0]["content"]
        assert selection is not None
        if words == "dead":
            raise EngineUnavailable("the engine died")
        if words == "bug":
            raise ZeroDivisionError
        if words == "moved":
            selection.calibration = None  # the alias means another version by now
        engine = FakeEngine(TEXTS.get(words, TEXTS["sure"]))
        with self._admission.admit(engine, selection.place) as admitted:
            self.searching.append(self._admission.requests)
            problem = Problem(token_ids=(1, 2), max_tokens=12, seed=1)
            answers = Answers(self._sandbox)
            name = f"run-{uuid.uuid4().hex}"
            run = Run(
                selection, problem, admitted, self._sandbox, answers, lambda event: None, name
            )
            selection.begin(run)
            outcome = await run.solve()
        return {
            "choices": [{"message": {"content": outcome.chosen.text}}],
            "usage": {"prompt_tokens": 2, "completion_tokens": 0, "total_tokens": 2},
        }


def served(requests: int = 2) -> FastAPI:
    app = FastAPI()
    app.include_router(batch.router)
    app.add_exception_handler(MullError, handle)
    state = app.state
    state.settings, state.adapters, state.shelf = Settings(), None, Shelf()
    state.served, state.batches = lambda: {"m"}, Batches()
    state.admission = Admission(requests=requests, candidates=8)
    state.chat = Chat(state.admission)
    return app


async def asked(app: FastAPI, *prompts: str, **fields: Any) -> httpx.Response:
    lines = [
        {"custom_id": str(at), "body": {"messages": [{"role": "user", "content": words}]}}
        for at, words in enumerate(prompts)
    ]
    body = {"model": "m", "requests": lines, "budget": {"tokens": 400}, "max_tokens": 12}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://m") as client:
        return await client.post(PATH, json=body | fields)


async def test_what_goes_wrong_with_a_prompt_is_its_own(caplog: pytest.LogCaptureFixture):
    app = served()
    said = (await asked(app, "sure", "dead", "split", "bug")).json()
    assert [one["response"]["status_code"] for one in said["data"]] == [200, 503, 200, 500]
    assert said["data"][3]["error"]["code"] == "internal_error"
    assert "a prompt of a batch failed" in caplog.text
    assert (said["decided"], said["failed"], said["leased"]) == (4, 2, 0)
    assert said["spent"]["tokens"] == sum(
        one["response"]["body"]["usage"]["completion_tokens"]
        for one in said["data"]
        if one["error"] is None
    )


async def test_a_prompt_that_lost_its_calibration_has_an_equal_share():
    said = (await asked(served(), "sure", "moved", "split", "split")).json()
    moved = said["data"][1]["response"]["body"]
    assert "no calibration" in moved["mull"]["plan"][0]["why"]
    assert moved["usage"]["completion_tokens"] <= 100
    assert said["failed"] == 0


async def test_a_batch_counts_as_one_request_and_is_refused_where_too_many_run():
    app = served(requests=1)
    assert (await asked(app, *["sure"] * 9)).status_code == 200
    assert set(app.state.chat.searching) == {1}
    assert app.state.admission.requests == 0
    with app.state.admission.enter():
        for stream in (False, True):
            reply = await asked(app, "sure", stream=stream)
            assert reply.status_code == 429
            assert reply.headers["Retry-After"]
