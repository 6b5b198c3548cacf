"""What a model's tokens say, asked of its upstream and remembered."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

from server.adapters.manifest import MANIFEST, Judging, read_manifest
from server.gateway.fleet import Fleet
from server.wire import JSON, as_list
from strategies.core.errors import EngineUnavailable, InvalidRequest, MullError
from strategies.core.types import Labels

MOST_ENDS = 8192
"""Tokens that may end a step: vLLM looks through them at every token."""

_SHELF = 8192
"""Tokens that are spelled by one request."""

_MOST_TOKENS = 1 << 20
_KEPT = 64
"""Delimiters whose tokens are remembered."""


class Vocabulary:
    """The tokens of one model, which all its upstreams share, and all its adapters."""

    def __init__(self, fleet: Fleet, model: str) -> None:
        self._fleet = fleet
        self._model = model
        self.ends: list[int] = []
        """The tokens with which the model ends a sequence, as far as they were seen."""
        self._probed = False
        self._changing = asyncio.Lock()
        self._words: list[str] | None = None
        self._found: dict[str, frozenset[int]] = {}
        self._labels: dict[str, Labels] = {}
        """By folder: an adapter's files do not change."""

    async def prompt(self, body: JSON, headers: Mapping[str, str], key: str | None) -> list[int]:
        """What `/tokenize` makes of words or of a conversation.

        Raises:
            InvalidRequest: The upstream refuses it.
        """
        reply = await self._fleet.ask(
            "/tokenize", body, model=self._model, headers=headers, key=key
        )
        return _ids(reply)

    async def encode(self, text: str, headers: Mapping[str, str]) -> tuple[int, ...]:
        """See `Engine.encode`."""
        body = {"model": self._model, "prompt": text, "add_special_tokens": False}
        return tuple(await self.prompt(body, headers, None)) if text else ()

    async def decode(self, token_ids: Sequence[int], headers: Mapping[str, str]) -> str:
        """Tokens in words, special ones included."""
        body = {"model": self._model, "tokens": list(token_ids)}
        reply = await self._fleet.ask(
            "/detokenize", body, model=self._model, headers=headers, key=None
        )
        text = reply.get("prompt")
        if not isinstance(text, str):
            raise EngineUnavailable("an upstream spelled tokens as something else than text")
        return text

    async def tokens_with(self, text: str, headers: Mapping[str, str]) -> frozenset[int]:
        """See `Engine.tokens_with`."""
        words = await self.words(headers)
        if text not in self._found:
            if len(self._found) == _KEPT:
                del self._found[next(iter(self._found))]
            self._found[text] = frozenset(at for at, word in enumerate(words) if text in word)
        found = self._found[text]
        if len(found) > MOST_ENDS:
            raise InvalidRequest(
                f"{len(found)} tokens of the model hold {text!r}; choose a delimiter that "
                f"{MOST_ENDS} hold at most",
                field="strategy.delimiter",
            )
        return found

    async def words(self, headers: Mapping[str, str]) -> list[str]:
        """Every token in words, by its id; asked for once."""
        async with self._changing:
            if self._words is None:
                self._words = await self._spell(headers)
        return self._words

    async def _spell(self, headers: Mapping[str, str]) -> list[str]:
        """All of them, many at a time, with one between them that shows where each begins.

        The end of a sequence never stands in a word, and is spelled alike everywhere. What has no
        token is spelled as nothing, so a shelf of nothing is behind the last.
        """
        await self.probe(headers)
        end = self.usual_end
        mark = await self.decode([end], headers)
        words: list[str] = []
        while len(words) < _MOST_TOKENS:
            shelf = range(len(words), len(words) + _SHELF)
            try:
                text = await self.decode([one for at in shelf for one in (at, end)], headers)
            except InvalidRequest:
                break  # some tokenizers know no token behind the last
            spelled = text.split(mark)[:-1] if mark else []
            if shelf.start <= end < shelf.stop:  # it stands there by itself, too
                del spelled[end - shelf.start]
                if len(spelled) == _SHELF:
                    spelled[end - shelf.start] = mark
            if len(spelled) != _SHELF:
                raise EngineUnavailable("an upstream's tokens cannot be told apart")
            words += spelled
            if not any(spelled):
                break
        return words

    @property
    def usual_end(self) -> int:
        """The token with which the model ends a sequence, as a rule.

        Raises:
            InvalidRequest: None was seen yet, and the upstream shows none when asked to.
        """
        if not self.ends:
            raise InvalidRequest(
                "this upstream does not tell which token ends a sequence, and the search needs it"
            )
        return self.ends[0]

    def learn(self, end: int) -> None:
        """A sequence has ended by itself with this token."""
        if end not in self.ends:
            self.ends.append(end)

    async def probe(self, headers: Mapping[str, str]) -> None:
        """Make the model end a sequence, by a choice of one word, and learn how it does."""
        if self._probed or self.ends:
            return
        body = {
            "model": self._model,
            "prompt": "a",
            "max_tokens": 4,
            "temperature": 0.0,
            "structured_outputs": {"choice": ["a"]},
            "return_token_ids": True,
        }
        try:
            reply = await self._fleet.ask(
                "/v1/completions", body, model=self._model, headers=headers, key=None
            )
        except EngineUnavailable:
            raise
        except MullError:
            reply = {}
        self._probed = True
        for choice in as_list(reply.get("choices")) or []:
            ids = as_list(choice.get("token_ids"))
            if choice.get("finish_reason") == "stop" and ids and isinstance(ids[-1], int):
                self.learn(ids[-1])

    async def judge(self, name: str, folder: Path, headers: Mapping[str, str]) -> Labels:
        """The labels of an adapter that judges, read from its folder, once.

        Raises:
            InvalidRequest: It does not judge, or its labels are no tokens of the model.
        """
        known = str(folder)
        if known not in self._labels:
            manifest = await asyncio.to_thread(read_manifest, folder)
            judging = None if manifest is None else manifest.judging
            if judging is None:
                raise InvalidRequest(
                    f"adapter '{name}' does not judge: it has no {MANIFEST} that says how",
                    field="verifier.adapter",
                )
            self._labels[known] = await self._read(judging, headers)
        return self._labels[known]

    async def _read(self, judging: Judging, headers: Mapping[str, str]) -> Labels:
        found: list[int] = []
        for label in (judging.labels.good, judging.labels.bad):
            ids = await self.encode(label, headers)
            if len(ids) != 1:
                raise InvalidRequest(
                    f"the labels of the verifier, '{judging.labels.good}' and "
                    f"'{judging.labels.bad}', are no tokens of the model",
                    field="verifier.adapter",
                )
            found += ids
        opening = None
        if judging.opening is not None:
            opening = (
                await self.encode(judging.opening.answers, headers),
                await self.encode(judging.opening.verdicts, headers),
            )
        return Labels(good=found[0], bad=found[1], delimiter=judging.delimiter, opening=opening)


class Vocabularies:
    """The vocabulary of each model of a fleet."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._known: dict[str, Vocabulary] = {}

    def of(self, model: str) -> Vocabulary:
        """That of a model, or of an adapter's base."""
        base = self._fleet.base(model)
        if base not in self._known:
            self._known[base] = Vocabulary(self._fleet, base)
        return self._known[base]


def _ids(reply: JSON) -> list[int]:
    tokens = as_list(reply.get("tokens"))
    if tokens is None or not all(isinstance(one, int) for one in tokens):
        raise EngineUnavailable("an upstream's tokens are no numbers")
    return tokens
