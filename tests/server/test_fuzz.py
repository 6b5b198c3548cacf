"""Requests and texts that nobody would send: each is taken or refused, none crashes.

Bodies are built from the fields that strategies have, so that most get past the first check. A
thousand cases each; ten thousand by `pytest tests/server/test_fuzz.py --hypothesis-profile=long`.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.datastructures import Headers

from server.selection import choose
from server.settings import Settings
from strategies.core.answers import AnswerFormat, Answers, arithmetic
from strategies.core.errors import InvalidRequest
from strategies.registry import ANY_STRATEGY, STRATEGIES
from tests.strategies.test_answers import NoSandbox, at_once

SETTINGS = Settings.model_validate(
    {"limits": {"tokens": 1000}, "presets": {"deep": {"strategy": {"kind": "best_of_n"}}}}
)
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
WORDS = (
    "tiny",
    "tiny:deep",
    "likelihood",
    "min",
    "never",
    "step",
    "exact",
    "\n",
    "",
    "\ud800",
    "☃",
)


def fuzzed(test: Callable[..., None]) -> int:
    """Run a test on as many examples as the profile says, a thousand at least; how many."""
    cases = max(1000, settings.get_profile(settings.get_current_profile_name()).max_examples)
    settings(
        max_examples=cases,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )(test)()
    return cases


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.integers(),
    st.floats(),
    st.sampled_from(WORDS),
    st.text(max_size=20),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=6,
)


def fields_of(kind: str) -> st.SearchStrategy[dict[str, Any]]:
    """A strategy with some of its fields, at defaults or at anything."""
    model = STRATEGIES[kind]
    names = sorted(model.model_fields.keys() - {"kind"})
    defaults = {name: model.model_fields[name].get_default() for name in names}
    one = st.one_of(*(st.just({name: defaults[name]}) for name in names if defaults[name] is None))
    anything = st.dictionaries(st.sampled_from(names), values, max_size=2)
    return st.tuples(one, anything).map(lambda both: {"kind": kind} | both[0] | both[1])


chosen = st.one_of(values, *(fields_of(kind) for kind in STRATEGIES), *map(st.just, STRATEGIES))
turns = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "tool"]), "content": values}),
    max_size=3,
)
bodies = st.fixed_dictionaries(
    {"model": st.sampled_from(["tiny", "tiny:deep", "tiny:nothing", "nobody"]) | values},
    optional={
        "messages": turns | values,
        "prompt": values,
        "strategy": chosen,
        "budget": values
        | st.dictionaries(st.sampled_from(["tokens", "seconds", "samples"]), scalars),
        "trace": values,
        "stream": values,
        "store": values,
        "n": scalars,
        "user": values,
        "tools": values,
        "stop": values,
        "temperature": scalars,
        "vllm_xargs": values | st.dictionaries(st.sampled_from(["strategy", "budget"]), values),
        "reasoning_effort": scalars,
    },
)


def test_requests_are_taken_or_refused_with_words():
    ended: Counter[str] = Counter()

    @given(bodies, st.sampled_from(PATHS), st.text(max_size=30) | st.sampled_from([*STRATEGIES]))
    def ask(body: dict[str, Any], path: str, header: str) -> None:
        sent = {"x-mull-strategy": header} if len(header) % 3 == 0 and header else {}
        headers = Headers(raw=[(k.encode(), v.encode("utf-8", "replace")) for k, v in sent.items()])
        try:
            _, selection = choose(body, {"tiny"}, headers, path, SETTINGS)
        except InvalidRequest as error:
            ended["refused" if str(error) else "without a word"] += 1
        else:
            ended["plain" if selection is None else "searched"] += 1

    cases = fuzzed(ask)
    assert ended.total() >= cases
    assert "without a word" not in ended
    assert min(ended[how] for how in ("plain", "searched", "refused")) > cases // 50, ended


@pytest.mark.parametrize("kind", STRATEGIES)
def test_strategies_read_what_they_write(kind: str):
    model = STRATEGIES[kind].model_validate({"kind": kind})
    assert ANY_STRATEGY.validate_python(ANY_STRATEGY.dump_python(model, mode="json")) == model


PIECES = (r"\boxed{", "}", r"\frac", "{1}", "1/2", "####", "The answer is ", "<think>", "</think>")
PIECES += (
    '{"a": 1}',
    "```json\n",
    "```",
    "(B)",
    "-",
    "1e9",
    "½",
    "\x00",
    "\ud800",
    "((",
    "\n",
    "9" * 50,
)
texts = st.one_of(
    st.text(max_size=80), st.lists(st.sampled_from(PIECES) | st.text(max_size=5)).map("".join)
)
forms = st.sampled_from(["auto", "math", "choice", "json", "number", "exact"]).map(
    lambda kind: AnswerFormat.model_validate({"kind": kind})
)


def test_any_text_has_an_answer_or_none():
    found = Counter[bool]()

    @given(texts, texts, forms)
    def read(text: str, other: str, form: AnswerFormat) -> None:
        answers = Answers(NoSandbox())
        answer = at_once(answers.extract(text, form))
        again = at_once(answers.extract(other, form))
        found[answer is not None] += 1
        arithmetic(text)
        if answer is not None:
            assert at_once(answers.place(answer, [answer], form)) == 0
            if again is not None and again == answer:
                assert at_once(answers.same(answer, again, form))

    cases = fuzzed(read)
    assert found.total() >= cases
    assert min(found.values()) > cases // 50, found
