"""One time around `mull-finetune loop`, for real: solved, learned from, checked and gated."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from server.adapters.registry import Registry


def rows(file: Path, *flags: str) -> Path:
    command = [sys.executable, "-m", "finetune.tiny.rows", "prompts", "--out", str(file), *flags]
    subprocess.run(command, check=True, timeout=120)
    return file


@pytest.mark.slow
def test_a_round_is_solved_learned_from_checked_and_gated(tmp_path: Path):
    problems = rows(tmp_path / "problems.jsonl", "--count", "12", "--families", "word")
    exam = rows(tmp_path / "exam.jsonl", "--count", "3", "--held-out")
    work = tmp_path / "work"
    command = [
        *(Path(sys.executable).with_name("mull-finetune"), "loop", "--problems", problems),
        *("--exam", exam, "--general", exam, "--grader", "finetune.tiny.rows:grade"),
        *("--work", work, "--min-gain", "2", "--max-tokens", "120"),
        *("--strategy", '{"kind": "best_of_n", "n": 4, "verifier": "likelihood"}'),
        *("--max_steps", "2", "--learning_rate", "1e-4", "--check_samples", "2"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    [said] = map(json.loads, (work / "rounds.jsonl").read_text().splitlines())
    assert (said["number"], said["problems"], said["served"]) == (1, 12, False)
    assert "does not pass the gate" in said["verdict"]  # nothing gains two of one
    assert said["rows"] == len((work / "round-1/rows.jsonl").read_text().splitlines()) > 0
    assert said["tokens"] > 0 < said["training_flops"]
    told = json.loads((work / "round-1/adapter/manifest.json").read_text())
    assert told["evaluation"] == said["evaluation"]
    assert said["evaluation"]["task.problems"] == 3
    assert (work / "rounds.png").read_bytes().startswith(b"\x89PNG")
    assert Registry(work / "registry").aliases() == {}
    again = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0  # the round is done: it is shown, and nothing is served
    assert len((work / "rounds.jsonl").read_text().splitlines()) == 1
