"""Nothing generated is uncounted, nothing is generated beyond the budget; on the real engine."""

import asyncio
import random
import time
from typing import Any

import httpx
import pytest

from bench.soak import clients, health, spread
from bench.stats import median
from strategies.registry import STRATEGIES

CHAT = "/v1/chat/completions"
QUESTIONS = [
    f"Tom has {a} apples. At the park he finds {b}. Ann gets {c} from him. "
    "How many apples does Tom have now?"
    for a, b, c in [(12, 7, 4), (31, 28, 17), (5, 9, 3), (44, 38, 29)]
] + ["Use the numbers 3, 5, 2 with + - * / to make 16. Use each number once."]


def counter(text: str, name: str) -> int:
    """The sum of a counter over its labels."""
    lines = [line for line in text.splitlines() if line.startswith((f"{name}{{", f"{name} "))]
    return int(sum(float(line.rsplit(" ", 1)[1]) for line in lines))


class Spent:
    """What the engine and Mull say was generated and read, now."""

    def __init__(self, metrics: str) -> None:
        self.generated = counter(metrics, "vllm:generation_tokens_total")
        self.prompt = counter(metrics, "vllm:prompt_tokens_total")
        self.ours = counter(metrics, "mull_tokens_total")
        self.our_prompt = counter(metrics, "mull_prompt_tokens_total")
        running = counter(metrics, "vllm:num_requests_running")
        self.inside = running + counter(metrics, "vllm:num_requests_waiting")
        self.busy = running + counter(metrics, "mull_running_requests")


async def settled(client: httpx.AsyncClient) -> Spent:
    async with asyncio.timeout(60):
        while (spent := Spent((await client.get("/metrics")).text)).busy:
            await asyncio.sleep(0.1)
    return spent


def mixed(rng: random.Random, number: int) -> dict[str, Any]:
    """One request of a mixed load, `how` it is read beside it."""
    body: dict[str, Any] = {
        "model": "mull-tiny",
        "messages": [{"role": "user", "content": rng.choice(QUESTIONS)}],
        "max_tokens": rng.choice([30, 120]),
        "seed": number,
        "temperature": 1.0,
    }
    how = ["plain", "whole", "stream", "tokens", "seconds", "hang up", "hang up", "drop"][
        number % 8
    ]
    if how != "plain":
        body["strategy"] = rng.choice(
            [
                {"kind": "chain_of_thought"},
                {"kind": "best_of_n", "n": 5},
                {"kind": "self_consistency", "n": 9},
                {"kind": "self_consistency", "n": 9, "early_stop": "confidence", "start": "all"},
                {"kind": "self_consistency", "n": 6, "early_stop": "never"},
                {"kind": "deep_confidence", "n": 9, "warmup": 3, "eta": 0.3, "group": 8},
                {"kind": "self_refine", "n": 5},
                {"kind": "budget_forcing", "end": "Answer", "wait": "apples: ", "extend": 2},
                {"kind": "beam_search", "width": 2, "branch": 3},
                {"kind": "beam_search", "width": 3, "branch": 2, "allocate": "diverse"},
                {"kind": "beam_search", "level": "token", "width": 3},
                {"kind": "tree_of_thoughts", "width": 2, "branch": 2, "search": "mcts"},
                {"kind": "tree_of_thoughts", "width": 2, "branch": 2, "evaluate": "value"},
            ]
        )
    if how == "tokens":
        body["budget"] = {"tokens": rng.randrange(1, 150)}
    if how == "seconds":
        body["budget"] = {"seconds": rng.choice([0.02, 0.1, 0.4])}
    if how in ("stream", "drop"):
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return {"how": how, "body": body, "name": f"mixed-{number}"}


async def load(client: httpx.AsyncClient, asked: dict[str, Any]) -> dict[str, Any] | None:
    """Send it, and give its usage if the reply has one."""
    how, headers = asked["how"], {"X-Request-Id": asked["name"]}
    if how == "hang up":
        try:
            await client.post(CHAT, json=asked["body"], headers=headers, timeout=0.3)
        except httpx.TimeoutException:
            return None
        return None
    if how == "drop":
        async with client.stream("POST", CHAT, json=asked["body"], headers=headers) as reply:
            async for _ in reply.aiter_lines():
                return None
    reply = await client.post(CHAT, json=asked["body"], headers=headers)
    if how == "stream":
        chunks = [line[6:] for line in reply.text.splitlines() if line.startswith("data: {")]
        return httpx.Response(200, text=chunks[-1]).json()["usage"]
    assert reply.status_code in (200, 422), reply.text
    return reply.json()["usage"] if reply.status_code == 200 else None


@pytest.mark.slow
async def test_usage_adds_up_to_the_engines_counters_over_a_mixed_load(server):
    rng = random.Random(0)
    asked = [mixed(rng, number) for number in range(240)]
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
        before = await settled(client)
        gate = asyncio.Semaphore(24)

        async def one(request: dict[str, Any]) -> dict[str, Any] | None:
            async with gate:
                return await load(client, request)

        usages = await asyncio.gather(*(one(request) for request in asked))
        after = await settled(client)
        generated = read = aborted = told = 0
        for request, usage in zip(asked, usages, strict=True):
            if request["how"] == "plain":
                assert usage is not None
                generated += usage["completion_tokens"]
                read += usage["prompt_tokens"]
                continue
            reply = await client.get(f"/v1/traces/{request['name']}")
            if reply.status_code == 404:  # it hung up before the search had begun
                assert usage is None
                continue
            spent = reply.json()["mull"]["usage"]
            fates = [
                spent[f"{fate}_tokens"] for fate in ("kept", "discarded", "aborted", "verifier")
            ]
            if usage is not None:
                told += 1
                assert sum(fates) == usage["completion_tokens"], request
                hidden = usage["completion_tokens_details"]["reasoning_tokens"]
                assert hidden == sum(fates) - spent["kept_tokens"]
            generated += sum(fates)
            aborted += spent["aborted_tokens"]
            read += spent["engine_prompt_tokens"]
    assert told >= 80
    assert aborted > 0
    assert generated == after.generated - before.generated
    assert read == after.prompt - before.prompt
    plain = [
        usage or {}
        for request, usage in zip(asked, usages, strict=True)
        if request["how"] == "plain"
    ]
    assert after.ours - before.ours == generated - sum(one["completion_tokens"] for one in plain)


def asked(run: dict[str, Any]) -> int:
    """Calls of a run that were no samples, but questions of a verifier."""
    return run["mull"]["usage"]["verifier_calls"]


@pytest.mark.slow
async def test_no_overspend_in_a_thousand_random_requests(server):
    rng = random.Random(1)
    over: list[Any] = []
    statuses: dict[int, int] = {}
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
        gate = asyncio.Semaphore(32)

        async def one(number: int) -> None:
            kind = rng.choice(list(STRATEGIES))
            budget: dict[str, Any] = {}
            if rng.random() < 0.7:
                budget["tokens"] = rng.choice([1, 2, 5, 17, 60, 200])
            if rng.random() < 0.4:
                budget["seconds"] = rng.choice([0.05, 0.3, 1.0])
            if rng.random() < 0.4:
                budget["samples"] = rng.randrange(1, 6)
            fields: dict[str, Any] = {}
            if kind in ("best_of_n", "self_consistency", "deep_confidence", "self_refine"):
                fields["n"] = rng.randrange(1, 8)
            if kind == "self_consistency":
                fields["early_stop"] = rng.choice(["never", "unassailable", "window"])
                fields["start"] = rng.choice(["all", "as_needed"])
            if kind == "deep_confidence":
                fields |= {"warmup": rng.randrange(1, 4), "eta": 0.3, "group": 4}
            if kind == "budget_forcing":
                fields |= {"end": rng.choice(["Answer", "\n"]), "max_thinking_tokens": 20}
            if kind in ("beam_search", "tree_of_thoughts"):
                fields |= {"width": rng.randrange(1, 4), "branch": rng.randrange(1, 4)}
            if kind == "beam_search":
                fields["allocate"] = rng.choice(["top_k", "diverse", "balanced", "resample"])
                fields["lookahead"] = rng.choice([0, 0, 1])
            if kind == "tree_of_thoughts":
                fields["search"] = rng.choice(["bfs", "dfs", "best_first", "mcts"])
                fields["evaluate"] = rng.choice(["verifier", "value", "vote"])
                if fields["evaluate"] != "verifier":
                    fields["thoughts"] = rng.choice(["sample", "propose"])
                fields["max_nodes"] = 24
            body = {
                "model": "mull-tiny",
                "messages": [{"role": "user", "content": rng.choice(QUESTIONS)}],
                "max_tokens": rng.choice([4, 24, 64]),
                "seed": number,
                "budget": budget,
            }
            async with gate:
                reply = await client.post(f"/v1/strategies/{kind}", json=body | fields)
            statuses[reply.status_code] = statuses.get(reply.status_code, 0) + 1
            if reply.status_code != 200:
                assert reply.json()["error"]["type"] == "budget_exhausted", reply.text
                return
            run = reply.json()
            spent, calls = run["usage"]["completion_tokens"], run["mull"]["usage"]["engine_calls"]
            if (
                spent > budget.get("tokens", spent)
                or calls - asked(run) > budget.get("samples", calls)
                or run["timings"]["total_seconds"] > budget.get("seconds", 60) + 0.5
            ):
                over.append((kind, fields, budget, run["usage"], run["timings"]))

        await asyncio.gather(*(one(number) for number in range(1000)))
    assert over == []
    assert statuses[200] > 700, statuses  # the others had no time for a token


async def latencies(url: str, body: dict[str, Any], asked: int) -> list[float]:
    """Seconds that each of so many took, one every 0.1 s whether or not the last is back.

    Not before a hundred sequences are in the engine.
    """
    async with httpx.AsyncClient(base_url=url, timeout=400) as client, asyncio.timeout(200):
        while Spent((await client.get("/metrics")).text).inside < 100:
            await asyncio.sleep(0.1)

        async def one(at: int) -> float:
            await asyncio.sleep(0.1 * at)
            began = time.monotonic()
            (await client.post(CHAT, json=body | {"seed": at})).raise_for_status()
            return time.monotonic() - began

        return await asyncio.gather(*(one(at) for at in range(asked)))


@pytest.mark.slow
async def test_a_crowd_is_answered_or_told_to_come_again_and_health_stays(server):
    body: dict[str, Any] = {
        "model": "mull-tiny",
        "messages": [{"role": "user", "content": QUESTIONS[0]}],
        "max_tokens": 12,
        "temperature": 1.0,
    }
    searched = body | {"strategy": {"kind": "self_consistency", "n": 4, "early_stop": "never"}}

    async def meanwhile(size: int, crowd: dict[str, Any]) -> tuple[list[httpx.Response], float]:
        """The replies to so many of these, and plain requests' median latency meanwhile."""
        async with clients(server.url, size) as several:
            loads = asyncio.gather(
                *(
                    client.post(CHAT, json=crowd | {"seed": 4 * at})
                    for at, client in enumerate(several)
                )
            )
            # On a loop of their own: the crowd's is busy.
            seconds = await asyncio.to_thread(asyncio.run, latencies(server.url, body, 20))
            return await loads, median(seconds)

    plain, among_plain = await meanwhile(512, body | {"n": 4})
    with health(server.url) as waited:
        searches, among_searches = await meanwhile(2000, searched)
    assert {reply.status_code for reply in plain} == {200}
    assert {reply.status_code for reply in searches} <= {200, 429}
    assert all("Retry-After" in reply.headers for reply in searches if reply.status_code == 429)
    assert sum(reply.status_code == 200 for reply in searches) >= 400
    assert among_searches <= 2 * among_plain
    assert len(waited) > 20
    assert spread(waited)["p99"] < 1
