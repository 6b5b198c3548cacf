"""A pool: what a server's samples and searches make of problems, each asked once.

One line of JSON a problem, so that a pool that was interrupted goes on.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
from rich.progress import Progress

from server.calibration.fit import Pooled, Vote
from strategies.core.aio import Arrivals
from strategies.core.answers import AnswerFormat, Answers

Grade = Callable[[Mapping[str, Any], str], float]

_SAMPLED: dict[str, Any] = {"logprobs": True}
"""Asked of samples; what searches end with votes without it."""


class Refused(Exception):
    """The server refused a problem."""


class Pool:
    """Problems with their samples, in a file."""

    def __init__(
        self,
        file: Path,
        client: httpx.AsyncClient,
        answers: Answers,
        *,
        model: str,
        n: int,
        verifier: Any,
        searches: Mapping[str, Mapping[str, Any]],
        max_tokens: int,
        temperature: float | None,
        grade: Grade | None,
    ) -> None:
        """`grade` says how right a text is; without, a row's `answer` does, or else the vote."""
        self._file = file
        self._client = client
        self._answers = answers
        self._sampled = _SAMPLED
        self._asked: dict[str, Any] = {"model": model, "max_tokens": max_tokens}
        if temperature is not None:
            self._asked["temperature"] = temperature
        self._n = n
        self._verifier = verifier
        self._searches = searches
        self._grade = grade
        self.adapter: str | None = None
        """The version that answered."""

    async def collect(
        self, rows: Sequence[Mapping[str, Any]], *, clients: int, progress: Progress
    ) -> list[Pooled]:
        """Ask what has not been asked yet; everything comes in the order of the rows.

        Raises:
            Refused: The server refuses a problem.
        """
        known = self._known()
        keys = [self._key(row) for row in rows]
        bar = progress.add_task("asking", total=len(rows), completed=sum(k in known for k in keys))

        async def one(at: int) -> None:
            pooled = await self._pooled(rows[at], seed=1_000 * at)
            with self._file.open("a") as file:
                file.write(json.dumps({"key": keys[at], "pooled": asdict(pooled)}) + "\n")
            known[keys[at]] = pooled
            progress.advance(bar)

        async with Arrivals[None]() as arrivals:
            for at, key in enumerate(keys):
                if key not in known:
                    arrivals.start(one(at))
                    if arrivals.pending >= clients:
                        await anext(arrivals)
            async for _ in arrivals:
                pass
        return [known[key] for key in keys]

    def _key(self, row: Mapping[str, Any]) -> str:
        """Of everything that decides what is asked and how it is judged."""
        asked = [row, self._asked, _SAMPLED, self._n, self._verifier, self._searches]
        return sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()

    def _known(self) -> dict[str, Pooled]:
        known: dict[str, Pooled] = {}
        for line in self._file.read_text().splitlines() if self._file.exists() else []:
            try:
                said = json.loads(line)
            except ValueError:  # cut off
                continue
            known[said["key"]] = _again(said["pooled"])
        return known

    async def _pooled(self, row: Mapping[str, Any], *, seed: int) -> Pooled:
        judged = {"verifier": self._verifier} if self._verifier else {}
        drawn = {"n": self._n, "seed": seed} | judged
        try:
            reply = await self._ask("best_of_n", row, self._sampled | drawn)
        except Refused as error:
            if "'logprobs'" not in str(error):
                raise
            self._sampled = {}  # a gateway has none to tell
            reply = await self._ask("best_of_n", row, drawn)
        self.adapter = reply["mull"].get("adapter")
        known: list[str] = []
        samples = await self._votes(row, reply, known)
        searches: dict[str, tuple[tuple[Vote, ...], int]] = {}
        for name, search in self._searches.items():
            fields = {key: value for key, value in search.items() if key != "kind"}
            found = await self._ask(search["kind"], row, fields | judged | {"seed": seed})
            votes = await self._votes(row, found, known)
            searches[name] = (votes, found["usage"]["completion_tokens"])
        if self._grade is None and row.get("answer") is None:
            samples, searches = _elected(samples, searches)
        return Pooled(
            prompt_tokens=reply["usage"]["prompt_tokens"],
            samples=samples,
            judging=reply["mull"]["usage"]["verifier_tokens"] / len(samples),
            searches=searches,
        )

    async def _ask(
        self, kind: str, row: Mapping[str, Any], fields: Mapping[str, Any]
    ) -> dict[str, Any]:
        prompt: Any = row["prompt"]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        body = self._asked | {"messages": messages, "store": False} | dict(fields)
        reply = await self._client.post(f"/v1/strategies/{kind}", json=body)
        if reply.status_code != 200:
            raise Refused(reply.text[:500])
        return reply.json()

    async def _votes(
        self, row: Mapping[str, Any], reply: Mapping[str, Any], known: list[str]
    ) -> tuple[Vote, ...]:
        """Of what ended by itself, or was cut: the latter has no answer."""
        votes: list[Vote] = []
        form = AnswerFormat()
        gold = row.get("answer")
        for one in reply["candidates"]:
            if one["text"] is None:
                continue
            answer = one["answer"] if one["finish_reason"] == "stop" else None
            place = None
            if answer is not None:
                place = await self._answers.place(answer, known, form)
                if place is None:
                    place = len(known)
                    known.append(answer)
            # Without a verifier the route judges by likelihood, and a server will not.
            score = one["score"] if self._verifier else None
            right = False
            if answer is not None and self._grade is not None:
                right = self._grade(row, one["text"]) >= 0.5
            elif answer is not None and gold is not None:
                right = await self._answers.place(answer, [str(gold)], form) is not None
            vote = Vote(
                place=place,
                right=right,
                score=score,
                tokens=one["tokens"],
                likelihood=one.get("likelihood"),
            )
            votes.append(vote)
        return tuple(votes)


def _elected(
    samples: tuple[Vote, ...], searches: Mapping[str, tuple[tuple[Vote, ...], int]]
) -> tuple[tuple[Vote, ...], dict[str, tuple[tuple[Vote, ...], int]]]:
    """Right is what most of all samples say, where nobody knows better."""
    places = [one.place for one in samples if one.place is not None]
    winner = max(places, key=places.count, default=None)

    def called(votes: Sequence[Vote]) -> tuple[Vote, ...]:
        return tuple(
            replace(one, right=one.place is not None and one.place == winner) for one in votes
        )

    return called(samples), {name: (called(v), spent) for name, (v, spent) in searches.items()}


def _again(said: Mapping[str, Any]) -> Pooled:
    def votes(found: Sequence[Mapping[str, Any]]) -> tuple[Vote, ...]:
        return tuple(Vote(**one) for one in found)

    return Pooled(
        prompt_tokens=said["prompt_tokens"],
        samples=votes(said["samples"]),
        judging=said["judging"],
        searches={name: (votes(v), spent) for name, (v, spent) in said["searches"].items()},
    )
