"""Rows as they are learned from: what the loss is on, what is dropped, and what the report says."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from finetune.data import (
    IGNORED,
    Exam,
    Judging,
    Report,
    Tokens,
    checked,
    listed,
    mixture,
    read,
    tokenised,
)
from finetune.graders import answer
from finetune.keys import Task
from models import MULL_TINY

TALK = [
    {"role": "system", "content": "You are a careful mathematician."},
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "Answer: \\boxed{5}"},
    {"role": "user", "content": "And 4 + 4?"},
    {"role": "assistant", "content": "Answer: \\boxed{8}"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MULL_TINY)


@pytest.fixture
def tokens(tokenizer: Any) -> Tokens:
    return Tokens(tokenizer, max_length=200)


def learned(tokenizer: Any, labels: list[int]) -> list[str]:
    """The stretches of text that the loss is on."""
    runs: list[list[int]] = [[]]
    for label in labels:
        if label == IGNORED:
            runs.append([])
        else:
            runs[-1].append(label)
    return [tokenizer.decode(run) for run in runs if run]


def test_of_a_dialogue_the_assistants_turns_are_learned_and_nothing_else(tokenizer, tokens):
    ids, labels = tokens.demonstration({"messages": TALK}, everything=False, turns=True)
    rendered = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert tokenizer.decode(ids) == rendered  # what is served
    # It learns to stop, and nothing of what the template puts behind that.
    assert learned(tokenizer, labels) == [
        "Answer: \\boxed{5}<|im_end|>",
        "Answer: \\boxed{8}<|im_end|>",
    ]
    ids, labels = tokens.demonstration({"messages": TALK}, everything=False, turns=False)
    assert labels == [*ids[:-1], IGNORED]


def test_of_a_prompt_with_its_completion_the_completion_is_learned(tokenizer, tokens):
    row = {"prompt": TALK[:2], "completion": "Answer: \\boxed{5}"}
    ids, labels = tokens.demonstration(row, everything=False, turns=False)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(TALK[:3], tokenize=False)
    (stretch,) = learned(tokenizer, labels)
    assert stretch == "Answer: \\boxed{5}<|im_end|>"
    ids, labels = tokens.demonstration(row, everything=True, turns=False)
    assert labels == [*ids[:-1], IGNORED]
    raw = {"prompt": "2 + 3 =", "completion": " 5"}
    ids, labels = tokens.demonstration(raw, everything=False, turns=False)
    assert tokenizer.decode(ids) == "2 + 3 = 5<|im_end|>"
    assert learned(tokenizer, labels) == [" 5<|im_end|>"]


def test_a_verdict_stands_after_each_step(tokenizer, tokens):
    judging = Judging(
        good="<|good|>",
        bad="<|bad|>",
        opening={"answers": "<|im_start|>assistant\n", "verdicts": "<|im_start|>verifier\n"},
    )
    row = {
        "prompt": TALK[1:2],
        "completion": "a: 2 + 3 = 5\nb: 5 + 1 = 7\nAnswer: \\boxed{7}",
        "labels": [True, False, None],
    }
    ids, labels = tokens.judged(row, judging)
    good, bad = tokenizer.convert_tokens_to_ids(["<|good|>", "<|bad|>"])
    said = {at: label for at, label in enumerate(labels) if label != IGNORED}
    assert list(said.values()) == [good, bad]
    for at, end in zip(said, ("= 5\n", "= 7\n"), strict=True):
        assert tokenizer.decode(ids[:at]).endswith(end)
    assert "<|im_start|>verifier\n" in tokenizer.decode(ids)
    ids, labels = tokens.judged(row | {"labels": [True, True, True]}, judging)
    assert labels[-1] == IGNORED or labels[-1] == good
    last = max(at for at, label in enumerate(labels) if label == good)
    assert tokenizer.decode(ids[:last]).endswith("\\boxed{7}<|im_end|>")
    with pytest.raises(ValueError, match="3 steps and 2 labels"):
        tokens.judged(row | {"labels": [True, True]}, judging)
    with pytest.raises(ValueError, match="has to be one"):
        tokens.judged(row, Judging(good="splendid", bad="-"))


def test_nothing_is_dropped_or_cut_silently(tokenizer, tmp_path: Path):
    rows: list[dict[str, Any]] = [
        {"prompt": TALK[:2], "completion": "Answer: \\boxed{5}"},
        {"prompt": TALK[:2], "completion": "Answer: \\boxed{5} " * 40},
        {"prompt": TALK[:2] * 20, "completion": "5"},
        {"prompt": TALK[:2]},
    ]
    report, tokens = Report(), Tokens(tokenizer, max_length=100)
    kept = tokenised(
        rows,
        report,
        lambda row: tokens.demonstration(row, everything=False, turns=False),
        max_length=100,
        stop=tokenizer.eos_token_id,
    )
    assert (report.rows, report.kept, report.truncated, len(kept)) == (4, 2, 1, 2)
    assert report.dropped == {
        "no token to learn from is left": 1,
        "no 'messages', no 'prompt' with 'completion', and no 'text'": 1,
    }
    report.write(tmp_path / "report.json")
    told = json.loads((tmp_path / "report.json").read_text())
    assert sum(told["histogram"].values()) == 2
    with pytest.raises(SystemExit, match="would never stop"):
        tokenised(rows[:1], Report(), lambda row: ([1, 2], [1, 2]), max_length=None, stop=3)


def test_pairs_that_teach_nothing_are_dropped(tokenizer, tmp_path: Path):
    file = tmp_path / "pairs.jsonl"
    pair = {"prompt": TALK[:2], "chosen": "5", "rejected": "6"}
    file.write_text("\n".join(json.dumps(one) for one in (pair, pair | {"rejected": "5"})))
    report = Report()
    kept = checked(
        read(str(file)), report, "pairs", Tokens(tokenizer, max_length=None), max_length=9
    )
    (row,) = listed(kept)
    assert row["chosen"] == [{"role": "assistant", "content": "5"}]
    assert (report.dropped, report.truncated) == ({"chosen and rejected are the same": 1}, 1)


def test_mixtures_are_drawn_by_fraction_and_replay_by_share(tmp_path: Path):
    for name, count in (("a", 40), ("b", 40), ("replay", 30)):
        lines = [json.dumps({"text": f"{name} {at}"}) for at in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    parts = [
        {"path": str(tmp_path / "a.jsonl")},
        {"path": str(tmp_path / "b.jsonl"), "fraction": 0.25},
    ]
    task = Task(
        datasets=json.dumps(parts),
        replay_name=str(tmp_path / "replay.jsonl"),
        replay_fraction=0.2,
    )
    texts = [row["text"] for row in listed(mixture(task, seed=1))]
    counts = {name: sum(text.startswith(name) for text in texts) for name in ("a", "b", "replay")}
    assert counts == {"a": 40, "b": 10, "replay": 12}  # 12 of 62: two in ten
    assert texts == [row["text"] for row in listed(mixture(task, seed=1))]
    task.replay_fraction = 0.6
    with pytest.raises(SystemExit, match="needs 75 of replay"):
        mixture(task, seed=1)
    for wrong in ('[{"path": "x", "weight": 1}]', "[", '[{"path": "x.jsonl", "fraction": 2}]'):
        with pytest.raises(SystemExit):
            mixture(Task(datasets=wrong), seed=1)


def test_overlap_with_the_test_set_is_told():
    long = "one two three four five six seven eight nine ten eleven twelve thirteen"
    test = [{"prompt": "What is 2 + 3?"}, {"prompt": f"{long} fourteen"}]
    rows = [{"prompt": "what is 2+3"}, {"prompt": f"zero {long}"}, {"prompt": "What is 2 + 4?"}]
    assert sum(map(Exam(test).has, rows)) == 2


def test_answers_are_equal_as_mathematics():
    assert answer({"answer": "1/2"}, "so it is \\boxed{0.5}") == 1.0
    assert answer({"answer": "1/2"}, "so it is \\boxed{0.6}") == 0.0
    assert answer({"answer": "1/2"}, "I do not know") == 0.0
