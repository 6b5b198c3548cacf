"""What one does without Mull: ask bare vLLM for n samples, and vote in the client."""

import time
from dataclasses import dataclass
from typing import Any

import httpx

from finetune.tiny.problems import grade
from finetune.tiny.solution import Item
from strategies.core.answers import AnswerFormat, Answers
from strategies.core.vote import Tally


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    right: bool
    tokens: int
    seconds: float


def question(model: str, item: Item, *, seed: int) -> dict[str, Any]:
    """What asks a problem, on every route that takes a chat."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": item.prompt}],
        "max_tokens": 400,
        "seed": seed,
    }


async def ask(
    client: httpx.AsyncClient, model: str, item: Item, *, seed: int, **fields: Any
) -> dict[str, Any]:
    """A whole chat completion for one problem."""
    reply = await client.post(
        "/v1/chat/completions",
        json=question(model, item, seed=seed) | fields,
    )
    reply.raise_for_status()
    return reply.json()


async def vote(
    client: httpx.AsyncClient, model: str, item: Item, answers: Answers, *, seed: int, n: int
) -> Answered:
    """Bare vLLM's n samples, and the answer that most of them give."""
    began = time.monotonic()
    body = await ask(client, model, item, seed=seed, n=n)
    texts = [choice["message"]["content"] for choice in body["choices"]]
    tally, first = Tally(), {}
    for index, text in enumerate(texts):
        answer = await answers.extract(text, AnswerFormat())
        if answer is not None:
            place = await answers.place(answer, tally.answers, AnswerFormat())
            first.setdefault(tally.count(place, answer, 1.0, index), text)
    ranked = tally.ranked()
    winner = first[tally.answers[ranked[0]]] if ranked else texts[0]
    return Answered(
        right=grade(item, winner),
        tokens=body["usage"]["completion_tokens"],
        seconds=time.monotonic() - began,
    )


async def search(
    client: httpx.AsyncClient, model: str, item: Item, *, seed: int, strategy: dict[str, Any]
) -> Answered:
    """The same by Mull."""
    began = time.monotonic()
    body = await ask(client, model, item, seed=seed, strategy=strategy)
    return Answered(
        right=grade(item, body["choices"][0]["message"]["content"]),
        tokens=body["usage"]["completion_tokens"],
        seconds=time.monotonic() - began,
    )
