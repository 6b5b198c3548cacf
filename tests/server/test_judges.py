"""Chat models that judge, reward models on other servers, and the servers themselves."""

import json
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from pydantic import ValidationError

from server.endpoints import Endpoint, Endpoints
from server.verifiers.catalogue import Allowed, adapters, resolve, talkers
from server.verifiers.judge import Judge
from server.verifiers.reward_model import RewardModel
from strategies.core.budget import Limits
from strategies.core.context import Verifier
from strategies.core.errors import BudgetSpent, InvalidRequest, VerifierFailed
from strategies.core.events import Consulted, Read
from strategies.core.strategy import VerifierChoice
from strategies.core.testing import FakeEngine, context
from strategies.core.types import Candidate, Chunk, Generation, Problem

PROBLEM = Problem(token_ids=(1,), text="What is 2 + 2?", seed=5)


def candidates(*texts: str) -> list[Candidate]:
    return [
        Candidate(index=at, text=text, token_ids=(at,), finish_reason="stop")
        for at, text in enumerate(texts)
    ]


class Saying(FakeEngine):
    """Answers each question by a function of its words."""

    def __init__(self, say: Callable[[str], str]) -> None:
        super().__init__([""])
        self._say = say

    async def generate(self, generation: Generation) -> AsyncGenerator[Chunk, None]:
        number = self.calls
        self.asked.append(generation)
        asked = self.rendered[number % len(self.rendered)][-1].content
        yield Chunk(text=self._say(asked), token_ids=(1, 2), finish_reason="stop", prompt_tokens=3)


class Answering:
    """A remote whose reply is made of the request, with the requests kept."""

    def __init__(self, answer: Callable[[Mapping[str, Any]], dict[str, Any]]) -> None:
        self._answer = answer
        self.asked: list[Mapping[str, Any]] = []

    async def post(self, name: str, body: Mapping[str, object], index: int) -> dict[str, Any]:
        self.asked.append(body)
        return self._answer(body)


async def test_grades_are_tenths_and_asked_of_the_model_itself():
    engine = Saying(lambda asked: "9" if "four" in asked else "2")
    async with context(engine) as ctx:
        verdicts = await Judge().judge(PROBLEM, candidates("four", "five"), ctx)
        assert [verdict.score for verdict in verdicts] == [0.9, 0.2]
        assert ctx.budget.spent == 4
        assert sum(one.tokens for one in ctx.events if isinstance(one, Read)) == 4
    assert "What is 2 + 2?" in engine.rendered[0][-1].content
    assert all(one.choices[0] == "0" and one.choices[-1] == "10" for one in engine.asked)


async def test_several_grades_make_their_mean_and_an_adapter_gives_them():
    engine = FakeEngine([""])  # says the choice that the seed points at
    async with context(engine) as ctx:
        judge = Judge(times=3, adapter="critic")
        [verdict] = await judge.judge(PROBLEM, candidates("four"), ctx)
    assert verdict.score == pytest.approx((0.5 + 0.6 + 0.7) / 3)
    assert {one.adapter for one in engine.asked} == {"critic"}
    assert talkers(Judge(adapter="critic")) == ["critic"]
    assert adapters(Judge(adapter="critic")) == []


def better_by_length(asked: str) -> str:
    a, b = (asked.split(f"Answer {side}:\n\n")[1].split("\n\n")[0] for side in "AB")
    return "tie" if len(a) == len(b) else "A" if len(a) > len(b) else "B"


async def test_comparisons_are_turned_around_and_make_shares_of_wins():
    engine = Saying(better_by_length)
    async with context(engine) as ctx:
        judge = Judge(mode="compare")
        verdicts = await judge.judge(PROBLEM, candidates("a", "bb", "cc", "dddd"), ctx)
    # A ring in which each meets the next two of four: everybody meets everybody.
    assert [verdict.score for verdict in verdicts] == [0.0, 0.5, 0.5, 1.0]
    assert len(engine.asked) == 2 * 6


async def test_a_judge_that_favours_a_place_finds_nothing_but_ties():
    async with context(Saying(lambda asked: "A")) as ctx:
        verdicts = await Judge(mode="compare").judge(PROBLEM, candidates("1", "2", "3"), ctx)
        assert [verdict.score for verdict in verdicts] == [0.5] * 3
        [alone] = await Judge(mode="compare").judge(PROBLEM, candidates("1"), ctx)
        assert alone.score == 1.0


async def test_a_refusal_is_no_verdict():
    engine = Saying(lambda asked: "I cannot say" if "five" in asked else "7")
    async with context(engine) as ctx:
        with pytest.raises(VerifierFailed, match="candidate 1; it said 'I cannot say'"):
            await Judge().judge(PROBLEM, candidates("four", "five"), ctx)
    compare = Saying(lambda asked: "no" if "five" in asked else better_by_length(asked))
    async with context(compare) as ctx:
        verdicts = await Judge(mode="compare", rivals=3).judge(
            PROBLEM, candidates("a", "bb", "ccc"), ctx
        )
        assert [verdict.score for verdict in verdicts] == [0, 0.5, 1]
        with pytest.raises(VerifierFailed, match="candidate 0"):
            await Judge(mode="compare").judge(PROBLEM, candidates("a", "five"), ctx)


@pytest.mark.parametrize("mode", ["grade", "compare"])
async def test_too_many_questions_are_refused_before_the_first(mode: str):
    engine = Saying(lambda asked: "5")
    async with context(engine) as ctx:
        judge = Judge.model_validate({"mode": mode, "times": 16})
        with pytest.raises(VerifierFailed, match="1024 at most"):
            await judge.judge(PROBLEM, candidates(*map(str, range(100))), ctx)
    assert engine.asked == []


async def test_what_was_set_aside_for_another_server_is_given_back():
    remote = Answering(lambda body: {"usage": {"completion_tokens": "many", "prompt_tokens": -3}})
    async with context(FakeEngine([""]), remote=remote, limits=Limits(tokens=100)) as ctx:
        with pytest.raises(BudgetSpent):
            await ctx.consult("gpt", [{}] * 10, max_tokens=32)
        assert (ctx.budget.spent, ctx.budget.reserved) == (0, 0)
        await ctx.consult("gpt", [{}] * 3, max_tokens=32)
        assert (ctx.budget.spent, ctx.budget.reserved) == (0, 0)


async def test_a_judge_elsewhere_is_asked_for_json_and_charged_to_the_budget():
    def grade(body: Mapping[str, Any]) -> dict[str, Any]:
        verdict = "8" if "four" in body["messages"][0]["content"] else "3"
        return {
            "choices": [{"message": {"content": json.dumps({"verdict": verdict})}}],
            "usage": {"prompt_tokens": 40, "completion_tokens": 7},
        }

    remote = Answering(grade)
    async with context(FakeEngine([""]), remote=remote, limits=Limits(tokens=100)) as ctx:
        verdicts = await Judge(endpoint="gpt").judge(PROBLEM, candidates("four", "five"), ctx)
        assert [verdict.score for verdict in verdicts] == [0.8, 0.3]
        assert ctx.budget.spent == 14
        told = [event for event in ctx.events if isinstance(event, Consulted)]
        assert [(one.name, one.tokens, one.prompt_tokens) for one in told] == [("gpt", 7, 40)] * 2
        with pytest.raises(BudgetSpent):
            await Judge(endpoint="gpt", times=3).judge(PROBLEM, candidates("four"), ctx)
    schema = remote.asked[0]["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["verdict"]["enum"] == [str(grade) for grade in range(11)]


@pytest.mark.parametrize(
    "message", [{"content": None, "refusal": "No."}, {"content": "{"}, {"content": "[1]"}, {}]
)
async def test_what_a_judge_elsewhere_says_instead_is_no_verdict(message: dict[str, Any]):
    remote = Answering(lambda body: {"choices": [{"message": message}]})
    async with context(FakeEngine([""]), remote=remote) as ctx:
        with pytest.raises(VerifierFailed, match="no verdict"):
            await Judge(endpoint="gpt").judge(PROBLEM, candidates("four"), ctx)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rivals": 2}, "needs mode 'compare'"),
        ({"prompt": "{question}"}, "no '{answer}'"),
        ({"mode": "compare", "prompt": "{question} {a}"}, "no '{b}'"),
        ({"endpoint": "x", "adapter": "y"}, "not both"),
        ({"times": 0}, "greater than or equal to 1"),
    ],
)
def test_a_judge_that_makes_no_sense_is_refused(fields: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        Judge.model_validate(fields)


KNOWN = {
    "gpt": Endpoint(api="chat", url="http://127.0.0.1:1", model="m"),
    "orm": Endpoint(api="classify", url="http://127.0.0.1:1", model="m"),
    "cross": Endpoint(api="score", url="http://127.0.0.1:1", model="m"),
    "prm": Endpoint(api="pooling", url="http://127.0.0.1:1", model="m", separator="<extra_0>"),
}


def chosen(**fields: Any) -> Verifier:
    return resolve(VerifierChoice.model_validate(fields), Allowed(endpoints=KNOWN))


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"kind": "reward_model", "name": "gpt"}, "verifier.name"),
        ({"kind": "reward_model", "name": "orn"}, "verifier.name"),
        ({"kind": "judge", "endpoint": "orm"}, "verifier.endpoint"),
        (
            {"kind": "ensemble", "of": ["likelihood", {"kind": "judge", "endpoint": "x"}]},
            "verifier.of.1.endpoint",
        ),
    ],
)
def test_endpoints_that_are_not_there_are_refused(fields: dict[str, Any], field: str):
    with pytest.raises(InvalidRequest) as caught:
        chosen(**fields)
    assert caught.value.field == field


async def judged(name: str, answer: Callable[[Mapping[str, Any]], dict[str, Any]], **more: Any):
    remote = Answering(answer)
    async with context(FakeEngine([""]), remote=remote) as ctx:
        verifier = chosen(kind="reward_model", name=name, **more)
        verdicts = await verifier.judge(PROBLEM, candidates("2 + 2 = 4\n4", "5"), ctx)
        assert len([one for one in ctx.events if isinstance(one, Consulted)]) == len(remote.asked)
    return verdicts, remote.asked


async def test_an_outcome_model_judges_whole_answers():
    def classify(body: Mapping[str, Any]) -> dict[str, Any]:
        good = 0.9 if "4" in body["messages"][1]["content"] else 0.25
        return {"data": [{"probs": [1 - good, good]}]}

    verdicts, asked = await judged("orm", classify)
    assert [verdict.score for verdict in verdicts] == [0.9, 0.25]
    assert asked[0]["messages"][0] == {"role": "user", "content": "What is 2 + 2?"}
    assert asked[0]["messages"][1] == {"role": "assistant", "content": "2 + 2 = 4\n4"}
    verdicts, asked = await judged("cross", lambda body: {"data": [{"score": 0.5}, {"score": 1}]})
    assert [verdict.score for verdict in verdicts] == [0.5, 1.0]
    assert asked == [{"text_1": "What is 2 + 2?", "text_2": ["2 + 2 = 4\n4", "5"]}]


async def test_a_process_model_judges_each_step():
    def pooling(body: Mapping[str, Any]) -> dict[str, Any]:
        steps = body["messages"][1]["content"].count("<extra_0>")
        return {"data": [{"data": [[0.2, 0.8], [0.4, 0.6]][:steps]}]}

    verdicts, asked = await judged("prm", pooling, over="product")
    assert [verdict.steps for verdict in verdicts] == [(0.8, 0.6), (0.8,)]
    assert verdicts[0].score == pytest.approx(0.48)
    assert asked[0]["messages"][1]["content"] == "2 + 2 = 4<extra_0>4<extra_0>"
    assert chosen(kind="reward_model", name="prm").stepwise
    assert not chosen(kind="reward_model", name="orm").stepwise


@pytest.mark.parametrize(
    ("name", "reply", "message"),
    [
        ("orm", {"data": []}, "gave 0 scores for 1"),
        ("orm", {"data": [{"probs": []}]}, "no probability of class"),
        ("orm", {"data": [{"probs": [3.5]}]}, "not a probability"),
        ("orm", {"data": [{"probs": [float("nan")]}]}, "not a probability"),
        ("cross", {"data": [{"score": 0.5}]}, "gave 1 scores for 2"),
        ("prm", {"data": [{"data": [[0.5, 0.5]] * 9}]}, "'separator'"),
    ],
)
async def test_what_a_reward_model_must_not_say(name: str, reply: dict[str, Any], message: str):
    with pytest.raises(VerifierFailed, match=message):
        await judged(name, lambda body: reply)


def test_a_reward_model_takes_no_tokens_aside():
    verifier = chosen(kind="reward_model", name="orm")
    assert isinstance(verifier, RewardModel)
    assert (verifier.aside(100), verifier.logprobs) == (0, None)


class Handler(BaseHTTPRequestHandler):
    heard: list[tuple[str, str | None, Any]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.heard.append((self.path, self.headers.get("Authorization"), body))
        status, said = {"bad": (500, b"{}"), "odd": (200, b"hello"), "list": (200, b"[]")}.get(
            body["model"], (200, b'{"data": [{"probs": [0.1, 0.9]}]}')
        )
        self.send_response(status)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def elsewhere() -> Iterator[tuple[str, list[tuple[str, str | None, Any]]]]:
    heard: list[tuple[str, str | None, Any]] = []
    handler = type("Heard", (Handler,), {"heard": heard})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/base/", heard
        server.shutdown()
        thread.join()


async def test_endpoints_are_asked_with_their_key_and_their_failures_are_named(elsewhere: Any):
    url, heard = elsewhere
    endpoints = Endpoints(
        {
            name: Endpoint.model_validate(
                {"api": "classify", "url": url, "model": name, "api_key": "secret"}
            )
            for name in ("good", "bad", "odd", "list")
        }
        | {"gone": Endpoint(api="chat", url="http://127.0.0.1:9", model="m", timeout_seconds=2)}
    )
    try:
        assert await endpoints.post("good", {"input": "x"}) == {"data": [{"probs": [0.1, 0.9]}]}
        assert heard == [("/base/classify", "Bearer secret", {"model": "good", "input": "x"})]
        for name, message in (
            ("bad", "'bad' answered with status 500"),
            ("odd", "'odd' gave no proper answer"),
            ("list", "something else than an object"),
            ("gone", "'gone' gave no proper answer"),
        ):
            with pytest.raises(VerifierFailed, match=message) as caught:
                await endpoints.post(name, {})
            assert "secret" not in str(caught.value)
    finally:
        await endpoints.close()


def test_a_key_is_not_shown():
    endpoint = Endpoint.model_validate(
        {"api": "chat", "url": "https://example.org/v1", "model": "m", "api_key": "secret"}
    )
    assert "secret" not in repr(endpoint)
    assert "secret" not in endpoint.model_dump_json()
    for url in ("ftp://x", "example.org", "http://", "http:///x", "http://host:99999999"):
        with pytest.raises(ValidationError):
            Endpoint(api="chat", url=url, model="m")
