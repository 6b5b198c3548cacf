"""Searches on the real engine, step by step and otherwise, and answers given to be judged."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from finetune.tiny.problems import exam
from models import MULL_TINY

WORD = (
    "Tom has 12 apples. At the park he finds 7. Ann gets 4 from him. "
    "How many apples does Tom have now?"
)
BODY: dict[str, Any] = {
    "model": "mull-tiny",
    "messages": [{"role": "user", "content": WORD}],
    "max_tokens": 200,
    "temperature": 1.0,
    "seed": 5,
}

PREFILLED: dict[str, Any] = {
    "messages": [*BODY["messages"], {"role": "assistant", "content": "Tom: 12"}],
    "add_generation_prompt": False,
}


def run(client: httpx.Client, kind: str, **fields: Any) -> dict[str, Any]:
    reply = client.post(f"/v1/strategies/{kind}", json=BODY | fields)
    assert reply.status_code == 200, reply.text
    return reply.json()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"allocate": "diverse"},
        {"allocate": "balanced", "lookahead": 1},
        {"allocate": "resample", "select": "weighted"},
        {"max_step_tokens": 3, "score": "product"},
        {"delimiter": " ="},
    ],
    ids=str,
)
def test_steps_make_whole_answers(client: httpx.Client, fields: dict[str, Any]):
    found = run(client, "beam_search", **fields)
    assert found["answer"] == "15"
    assert found["finish_reason"] == "stop"
    assert found["text"].endswith("Answer: \\boxed{15}")
    usage = found["mull"]["usage"]
    kept = len(PreTrainedTokenizerFast.from_pretrained(MULL_TINY)(found["text"]).input_ids) + 1
    assert usage["kept_tokens"] == kept
    assert 0 < usage["continuation_cached_tokens"] < usage["continuation_prompt_tokens"]
    assert usage["continuation_prompt_tokens"] < usage["engine_prompt_tokens"]
    hidden = found["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert hidden == usage["discarded_tokens"] + usage["aborted_tokens"]


def test_chat_gives_the_whole_answer_with_its_log_probabilities(client: httpx.Client):
    body = BODY | {"strategy": "beam_search", "logprobs": True, "top_logprobs": 2}
    reply = client.post("/v1/chat/completions", json=body).json()
    [choice] = reply["choices"]
    tokens = choice["logprobs"]["content"]
    assert "".join(one["token"] for one in tokens).startswith(choice["message"]["content"])
    assert all(len(one["top_logprobs"]) == 2 for one in tokens)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"min_tokens": 4}, "min_tokens"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"response_format": {"type": "json_object"}}, "structured_outputs"),
        ({"strategy": {"kind": "beam_search", "verifier": "countdown"}}, "verifier.kind"),
        (
            {"strategy": {"kind": "beam_search", "verifier": {"kind": "adapter", "adapter": "x"}}},
            "verifier.adapter",
        ),
        ({"strategy": {"kind": "beam_search", "level": "token"}, "top_p": 0.9}, "top_p"),
        (
            {"strategy": {"kind": "beam_search", "level": "token"}, "temperature": 0.5},
            "temperature",
        ),
        ({"strategy": {"kind": "tree_of_thoughts", "thoughts": "propose"}}, "verifier.kind"),
        (
            {
                "strategy": {
                    "kind": "tree_of_thoughts",
                    "thoughts": "propose",
                    "evaluate": "value",
                },
                "logprobs": True,
            },
            "logprobs",
        ),
        ({"stop": ["so"]}, "stop"),
        ({"strategy": {"kind": "budget_forcing", "end": "Answer"}, "min_tokens": 4}, "min_tokens"),
        ({"strategy": "budget_forcing", "logprobs": True}, "logprobs"),
        (
            {"strategy": {"kind": "self_refine", "revise_prompt": "apple " * 1300}},
            "messages",
        ),
        ({"strategy": "self_refine", "continue_final_message": True, **PREFILLED}, "messages"),
        ({"trace": "all"}, "trace"),
        ({"strategy": {"kind": "beam_search", "verifier": "judge"}}, "verifier.kind"),
        (
            {"strategy": {"kind": "best_of_n", "verifier": {"kind": "reward_model", "name": "x"}}},
            "verifier.name",
        ),
        (
            {
                "strategy": {
                    "kind": "self_consistency",
                    "weight": "verifier",
                    "verifier": {"kind": "judge", "mode": "compare"},
                }
            },
            "verifier",
        ),
        ({"n": 9}, "n"),
    ],
    ids=lambda one: str(one)[:100],
)
def test_what_cannot_be_kept_step_by_step_is_refused(
    client: httpx.Client, fields: dict[str, Any], param: str
):
    body = BODY | {"strategy": "beam_search"} | fields
    reply = client.post("/v1/chat/completions", json=body)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param


@pytest.mark.slow
def test_over_tokens_it_finds_what_transformers_finds(client: httpx.Client):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(MULL_TINY, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(MULL_TINY, dtype=torch.float32)
    width = 3
    turns = [[{"role": "user", "content": item.prompt}] for item in exam(11, 25)]

    def search(messages: list[dict[str, str]]) -> dict[str, Any]:
        asked = {"model": "mull-tiny", "messages": messages, "max_tokens": 200}
        asked |= {"level": "token", "width": width}
        return client.post("/v1/strategies/beam_search", json=asked, timeout=300).json()

    with ThreadPoolExecutor(max_workers=10) as threads:
        found = list(threads.map(search, turns))
    alike = 0
    for first in range(0, len(turns), 10):
        prompts = tokenizer.apply_chat_template(
            turns[first : first + 10],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        )
        expected = model.generate(
            **prompts,
            num_beams=width,
            num_return_sequences=width,
            do_sample=False,
            max_new_tokens=200,
            return_dict_in_generate=True,
            output_scores=True,
        )
        written = expected.sequences[:, prompts["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(written, skip_special_tokens=True)
        scores = expected.sequences_scores.tolist()
        for at, one in enumerate(found[first : first + 10]):
            theirs = slice(width * at, width * (at + 1))
            ours = sorted(one["candidates"], key=lambda of: -(of["score"] or -1e9))[:width]
            assert one["text"] == ours[0]["text"]
            assert ours[0]["score"] == pytest.approx(scores[theirs][0], abs=0.05)
            if [of["text"] for of in ours] == texts[theirs]:
                alike += 1
                assert [of["score"] for of in ours] == pytest.approx(scores[theirs], abs=1e-2)
    # A server in bfloat16 rounds, and of hypotheses that are equally likely it may keep another.
    assert alike >= 0.75 * len(turns)


def test_over_tokens_of_width_one_it_is_greedy(client: httpx.Client):
    found = run(client, "beam_search", level="token", width=1)
    plain = client.post("/v1/chat/completions", json=BODY | {"temperature": 0}).json()
    assert found["text"] == plain["choices"][0]["message"]["content"]
    usage = found["mull"]["usage"]
    assert usage["kept_tokens"] == plain["usage"]["completion_tokens"]


@pytest.mark.parametrize("search", ["bfs", "dfs", "best_first", "mcts"])
def test_trees_of_thoughts_find_the_answer(client: httpx.Client, search: str):
    found = run(client, "tree_of_thoughts", search=search, width=3, branch=3, solutions=3)
    assert found["answer"] == "15"
    assert found["finish_reason"] == "stop"


@pytest.mark.parametrize("evaluate", ["value", "vote"])
@pytest.mark.parametrize("thoughts", ["sample", "propose"])
def test_the_model_may_judge_its_own_thoughts(client: httpx.Client, evaluate: str, thoughts: str):
    found = run(
        client,
        "tree_of_thoughts",
        evaluate=evaluate,
        thoughts=thoughts,
        width=2,
        branch=2,
        max_nodes=16,
        max_depth=3,
    )
    assert found["mull"]["usage"]["verifier_tokens"] > 0
    assert found["text"]


@pytest.mark.parametrize("kind", ["beam_search", "tree_of_thoughts"])
def test_the_whole_tree_is_in_the_reply(client: httpx.Client, kind: str):
    found = run(client, kind, trace="full")
    nodes = {node["index"]: node for node in found["mull"]["tree"]}
    (leaf,) = (node for node in nodes.values() if node["chosen"])
    words = ""
    node: dict[str, Any] | None = leaf
    while node is not None:
        words = node["text"] + words
        assert node["score"] is not None
        node = None if node["parent"] is None else nodes[node["parent"]]
    assert words == found["text"]
    spent = found["mull"]["usage"]
    aborted, verifier = spent["aborted_tokens"], spent["verifier_tokens"]
    whole = found["usage"]["completion_tokens"] - aborted - verifier
    assert sum(node["tokens"] for node in nodes.values()) == whole
    summary = run(client, kind, trace="summary")["mull"]
    assert "trace" not in summary
    assert not any("text" in node for node in summary["tree"])
    assert {node["index"]: node["parent"] for node in summary["tree"]} == {
        index: node["parent"] for index, node in nodes.items()
    }


@pytest.mark.parametrize("thoughts", ["sample", "propose"])
def test_proposed_thoughts_are_in_the_tree(client: httpx.Client, thoughts: str):
    fields = {"thoughts": thoughts, "evaluate": "value", "width": 2, "branch": 2, "max_depth": 3}
    found = run(client, "tree_of_thoughts", **fields, max_nodes=16, trace="full")
    nodes = {node["index"] for node in found["mull"]["tree"]}
    assert all(node["parent"] in {None, *nodes} for node in found["mull"]["tree"])


async def test_a_search_is_gone_a_second_after_its_client_at_any_depth(server: Any, running: Any):
    slow = {"max_tokens": 900, "ignore_eos": True, "temperature": 1.5, "max_step_tokens": 8}
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        for kind, fields in (
            ("beam_search", {"width": 8, "branch": 4}),
            ("beam_search", {"width": 8, "branch": 4, "allocate": "diverse", "lookahead": 2}),
            ("tree_of_thoughts", {"width": 8, "branch": 4, "search": "mcts"}),
        ):
            for depth in (1, 3, 6):
                name = f"leave-{kind}-{len(fields)}-{depth}"
                headers = {"X-Request-Id": name}
                asked = client.post(
                    f"/v1/strategies/{kind}", json=BODY | slow | fields, headers=headers
                )
                asking = asyncio.create_task(asked)
                async with asyncio.timeout(30):
                    while await depth_of(client, name) < depth:
                        assert not asking.done(), asking.result().text
                        await asyncio.sleep(0.01)
                asking.cancel()
                left = time.monotonic()
                while await running(client) > 0:
                    await asyncio.sleep(0.02)
                    assert time.monotonic() - left < 1.0, (kind, fields, depth)
                ended = (await client.get(f"/v1/traces/{name}")).json()
                assert ended["over"]
                assert ended["events"][-1]["stopped"] == "cancelled"
                usage = ended["mull"]["usage"]
                assert usage["aborted_tokens"] + usage["discarded_tokens"] > 0
                assert usage["kept_tokens"] == 0


async def depth_of(client: httpx.AsyncClient, name: str) -> int:
    """How many steps the deepest path of a running search has."""
    reply = await client.get(f"/v1/traces/{name}")
    if reply.status_code == 404:
        return 0
    depths: dict[int | None, int] = {None: 0}
    for event in reply.json()["events"]:
        if event["event"] == "sampled":
            depths[event["index"]] = depths[event.get("parent")] + 1
    return max(depths.values())


def test_traces_that_become_unsure_are_aborted_and_logprobs_are_as_asked_for(client: httpx.Client):
    fields = {"n": 12, "eta": 0.25, "group": 8, "consensus": 1}
    asked = BODY | {"temperature": 1.5, "logprobs": True, "top_logprobs": 2}
    asked |= {"strategy": {"kind": "deep_confidence", **fields}, "trace": "full"}
    reply = client.post("/v1/chat/completions", json=asked).json()
    aborted = [one["tokens"] for one in reply["mull"]["trace"] if one["event"] == "aborted"]
    assert len(aborted) >= 3
    assert min(aborted) >= 8, "the first group has to be full"
    assert sum(aborted) < len(aborted) * 40, "cut off in flight"
    assert reply["mull"]["usage"]["aborted_tokens"] == sum(aborted)
    tokens = reply["choices"][0]["logprobs"]["content"]
    assert {len(one["top_logprobs"]) for one in tokens} == {2}
    asked = {"model": "mull-tiny", "prompt": WORD, "max_tokens": 9, "logprobs": 0}
    asked |= {"strategy": {"kind": "deep_confidence", "n": 2}}
    [choice] = client.post("/v1/completions", json=asked).json()["choices"]
    assert {len(one) for one in choice["logprobs"]["top_logprobs"]} == {1}


def test_a_revision_goes_on_with_the_clients_own_conversation(client: httpx.Client):
    turns = [{"role": "system", "content": "You count."}, *BODY["messages"]]
    judged = {"kind": "regex", "pattern": "."}
    asked = {
        "messages": turns,
        "n": 2,
        "parallel": 1,
        "revise_prompt": "Again.",
        "verifier": judged,
    }
    found = run(client, "self_refine", **asked)
    said = [
        {"role": "assistant", "content": found["candidates"][0]["text"]},
        {"role": "user", "content": "Again."},
    ]
    lengths = [
        client.post("/tokenize", json={"model": "mull-tiny", "messages": one}).json()["count"]
        for one in (turns, turns + said)
    ]
    usage = found["mull"]["usage"]
    assert usage["engine_prompt_tokens"] == sum(lengths)
    assert usage["engine_cached_tokens"] > 0
    assert found["candidates"][0]["fate"] == "kept", "a revision that is no better is not taken"


def test_thinking_is_held_to_a_length(client: httpx.Client):
    longer = run(client, "budget_forcing", end="Answer", wait="apples: ", trace="full")
    first, put, *_, last = longer["mull"]["tree"]
    assert first["text"].endswith("Answer")
    assert (put["text"], put["tokens"], put["parent"]) == ("apples: ", 0, first["index"])
    assert longer["text"].startswith(first["text"].removesuffix("Answer") + "apples: ")
    assert longer["text"].endswith(last["text"])
    assert longer["mull"]["usage"]["kept_tokens"] == longer["usage"]["completion_tokens"]
    shorter = run(
        client, "budget_forcing", end="Answer", max_thinking_tokens=12, cue=": \\boxed{", extend=0
    )
    assert "Answer: \\boxed{" in shorter["text"]
    assert shorter["candidates"][0]["answer"] is not None
    tokens = PreTrainedTokenizerFast.from_pretrained(MULL_TINY)
    assert len(tokens(shorter["text"].partition("Answer")[0]).input_ids) == 12


@pytest.mark.parametrize("mode", ["grade", "compare"])
def test_the_model_judges_whole_answers_with_one_of_the_verdicts(client: httpx.Client, mode: str):
    found = run(client, "best_of_n", n=4, verifier={"kind": "judge", "mode": mode})
    scores = [one["score"] for one in found["candidates"]]
    steps = 10 if mode == "grade" else 2 * 3
    assert all(score * steps == pytest.approx(round(score * steps)) for score in scores)
    assert found["mull"]["usage"]["verifier_calls"] == (4 if mode == "grade" else 12)


def test_soft_selection_is_a_seeded_draw(client: httpx.Client):
    one, same = (run(client, "best_of_n", n=4, select="soft", softness=5.0) for _ in range(2))
    assert one["text"] == same["text"]


def test_given_answers_are_judged(client: httpx.Client):
    asked = {
        "model": "mull-tiny",
        "messages": BODY["messages"],
        "candidates": ["1 + 1 = 2\n2 + 2 = 5", "1 + 1 = 2"],
        "verifier": "arithmetic",
    }
    reply = client.post("/v1/verify", json=asked)
    assert reply.status_code == 200, reply.text
    verdicts = reply.json()["data"]
    assert [one["score"] for one in verdicts] == [0.5, 1.0]
    assert [one["steps"] for one in verdicts] == [[1.0, 0.0], [1.0]]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"candidates": []}, "candidates"),
        ({"candidates": [""]}, "candidates.0"),
        ({"verifier": "likelihood"}, "verifier.kind"),
        ({"verifier": "nobody"}, "verifier.kind"),
        ({"unknown": 1}, "unknown"),
        ({"messages": []}, "messages"),
    ],
)
def test_what_cannot_be_judged_is_refused(client: httpx.Client, fields: dict[str, Any], param: str):
    asked = {
        "model": "mull-tiny",
        "messages": BODY["messages"],
        "candidates": ["1 + 1 = 2"],
        "verifier": "arithmetic",
    }
    reply = client.post("/v1/verify", json=asked | fields)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param
