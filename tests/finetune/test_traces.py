"""Rows out of traces: what is right, what is paired with what, and which steps are labelled."""

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.traces import Solution, main, matched, stepwise

PROMPT = [{"role": "user", "content": "What is 2 + 3?"}]


def solution(text: str, *, tokens: int = 10, score: float | None = None, answer: str = "5"):
    return {
        "index": 0,
        "text": text,
        "answer": answer,
        "complete": True,
        "tokens": tokens,
        "score": score,
    }


def run(*candidates: dict[str, Any], prompt: Any = PROMPT, votes: Any = None) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "prompt": prompt,
        "strategy": {"kind": "best_of_n", "verifier": {"kind": "countdown"}},
        "votes": votes or {},
        "candidates": list(candidates),
    }


@pytest.fixture
def made(tmp_path: Path):
    def making(runs: list[Any], *flags: str) -> list[dict[str, Any]]:
        lines = [one if isinstance(one, str) else json.dumps(one) for one in runs]
        (tmp_path / "traces-1.jsonl").write_text("\n".join(lines) + "\n")
        out = tmp_path / "rows.jsonl"
        main(["--from-traces", str(tmp_path), "--out", str(out), *flags])
        return [json.loads(line) for line in out.read_text().splitlines()]

    return making


def test_right_solutions_become_demonstrations_each_text_once(made, capsys):
    good = solution("2 + 3 = 5", score=0.95)
    rows = made(
        [run(good, solution("2 + 3 = 6", score=0.02)), run(good), '{"cut', run() | {"votes": 1}],
        *("--to", "demonstrations"),
    )
    assert rows == [{"prompt": PROMPT, "completion": "2 + 3 = 5"}]
    said = capsys.readouterr().out
    assert "lines that cannot be read" in said


def test_what_nobody_can_tell_and_what_was_cut_off_is_no_row(made):
    cut = solution("2 + 3", score=1.0) | {"complete": False}
    with pytest.raises(SystemExit, match="no row came"):
        made([run(solution("2 + 3 = 5", score=0.5), cut)], "--to", "demonstrations")


def test_votes_tell_only_where_they_agree(made):
    right, wrong = solution("so 5"), solution("so 6", answer="6")
    split = run(right, wrong, prompt="other", votes={"5": 1.0, "6": 1.0, "7": 1.0})
    rows = made(
        [run(right, wrong, votes={"5": 3.0, "6": 1.0}), split],
        *("--to", "labelled", "--by", "votes"),
    )
    assert [(row["completion"], row["label"]) for row in rows] == [("so 5", True), ("so 6", False)]


def test_a_grader_decides_by_known_answers(made, tmp_path: Path):
    answers = tmp_path / "answers.jsonl"
    answers.write_text(json.dumps({"prompt": PROMPT, "answer": "5"}) + "\n")
    runs = [run(solution(r"It is \boxed{5}", score=0.0), solution(r"It is \boxed{6}", score=1.0))]
    rows = made(
        runs, "--to", "pairs", "--by", "grader", "--answers", str(answers), "--longer", "1.5"
    )
    assert rows == [
        {"prompt": PROMPT, "chosen": r"It is \boxed{5}", "rejected": r"It is \boxed{6}"}
    ]
    with pytest.raises(SystemExit):
        made(runs, "--to", "pairs", "--by", "grader")


def test_only_the_named_verifier_is_believed_and_what_it_knows_counts(made):
    other = run(solution("a", score=0.99)) | {"strategy": {"kind": "self_consistency"}}
    unsure, sure = run(solution("b", score=0.5)), run(solution("b", score=1.0))
    rows = made([other, unsure, sure], "--to", "demonstrations", "--verifier", "countdown")
    assert [row["completion"] for row in rows] == ["b"]


def test_a_test_set_is_left_out(made, tmp_path: Path):
    exam = tmp_path / "exam.jsonl"
    exam.write_text(json.dumps({"prompt": PROMPT}) + "\n")
    runs = [run(solution("a", score=1.0)), run(solution("b", score=1.0), prompt="another question")]
    rows = made(runs, "--to", "demonstrations", "--exclude", str(exam))
    assert [row["prompt"] for row in rows] == ["another question"]


def test_no_traces_says_what_to_do(tmp_path: Path):
    with pytest.raises(SystemExit, match="MULL_TRACES"):
        main(["--from-traces", str(tmp_path), "--to", "pairs", "--out", str(tmp_path / "rows")])


def test_pairs_are_of_like_length():
    right = [Solution("a", 10, True), Solution("b", 40, True)]
    wrong = [Solution("c", 20, False), Solution("d", 11, False)]
    pairs = list(matched(right, wrong, 1.25))
    assert [(good.text, bad.text) for good, bad in pairs] == [("a", "d")]


def test_steps_are_right_if_a_right_solution_begins_with_them():
    found = stepwise(
        [
            Solution("A\nB\nC", 3, True),
            Solution("A\nX\nD", 3, False),
            Solution("A\nX\nE", 3, False),
            Solution("Y\nZ", 2, False),
        ]
    )
    assert found == [[True] * 3, [True, False, None], [True, False, None], [None, False]]
