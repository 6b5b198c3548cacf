"""What training writes, the server reads: the folder of an adapter is all they share."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from finetune.adapter import Base, Manifest, publishing
from models import MULL_TINY
from server.adapters.manifest import MANIFEST, Trained, read_manifest

JUDGING = {
    "labels": {"good": "<|good|>", "bad": "<|bad|>"},
    "delimiter": "\n",
    "opening": {"answers": "<|im_start|>assistant\n", "verdicts": "<|im_start|>verifier\n"},
}


@pytest.fixture(scope="module")
def base() -> Base:
    return Base.of(MULL_TINY, AutoTokenizer.from_pretrained(MULL_TINY))


@pytest.mark.parametrize("judging", [None, JUDGING], ids=["policy", "verifier"])
def test_the_server_reads_what_training_wrote(base: Base, judging: dict | None, tmp_path: Path):
    written = Manifest(
        kind="verifier" if judging else "policy",
        base=base,
        judging=judging,
        recipe={"rank": 16, "targets": ["q_proj"]},
        data={"word": "0" * 64},
        compute={"tokens": 1.5e6, "seconds": 12},
        evaluation={"word.accuracy": 0.5},
    )
    written.write(tmp_path)
    read = read_manifest(tmp_path)
    assert read is not None
    assert read.model_dump() == {"schema_version": 1} | asdict(written)


def test_the_server_knows_the_model_that_was_trained(base: Base):
    from server.local.adapters import Base as Served

    tokenizer = AutoTokenizer.from_pretrained(MULL_TINY)
    served = Served.find(str(MULL_TINY), lambda: tokenizer, None)
    assert served.differs(Trained.model_validate(asdict(base))) is None
    assert served.differs(Trained()) is None  # nothing is known, nothing is compared
    for part, words in (
        ("weights", "weights"),
        ("tokenizer", "tokenizer"),
        ("chat_template", "chat template"),
    ):
        other = asdict(base) | {part: "0" * 64}
        assert served.differs(Trained.model_validate(other)) == words
    other = Served.find(str(MULL_TINY), lambda: tokenizer, "another template")
    assert other.differs(Trained.model_validate(asdict(base))) == "chat template"
    missing = Served.find("nobody/nothing", lambda: tokenizer, None)
    assert missing.folder is None
    assert missing.differs(Trained.model_validate(asdict(base))) is None


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path):
    out = tmp_path / "new" / "adapter"

    def publish(text: str, fails: bool = False) -> None:
        with publishing(out) as folder:
            (folder / "weights").write_text(text)
            (folder / MANIFEST).write_text(json.dumps(text))
            assert not out.exists() or (out / "weights").read_text() != text
            if fails:
                raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        publish("first", fails=True)
    assert not out.exists()
    publish("first")
    assert (out / "weights").read_text() == "first"
    with pytest.raises(OSError, match="full"):
        publish("second", fails=True)
    assert (out / "weights").read_text() == "first"
    publish("third")
    assert (out / "weights").read_text() == "third"
    assert [path.name for path in out.parent.iterdir()] == ["adapter"]
