"""What a training's log says of reward hacking."""

from pathlib import Path

from finetune.drift import figures, plot

LOG = [
    {
        "step": step,
        "rewards/grader/mean": 0.5 - step / 100,
        "rewards/proxy/mean": 0.5 + step / 100,
        "completions/mean_length": 100.0 + step,
    }
    for step in range(1, 11)
] + [{"step": 10, "train_runtime": 3.0}]


def test_a_proxy_that_rises_while_the_truth_falls_stands_in_the_figures(tmp_path: Path):
    found = figures(LOG)
    assert found["training.proxy_last"] > found["training.proxy_first"]
    assert found["training.grader_last"] < found["training.grader_first"]
    assert (found["training.length_first"], found["training.length_last"]) == (101.5, 109.5)
    plot(LOG, tmp_path / "drift.png")
    assert (tmp_path / "drift.png").read_bytes().startswith(b"\x89PNG")


def test_what_reports_none_has_none(tmp_path: Path):
    assert figures([{"step": 1, "loss": 2.0}]) == {}
    plot([{"step": 1, "loss": 2.0}], tmp_path / "drift.png")
    assert not (tmp_path / "drift.png").exists()
