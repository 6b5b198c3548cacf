"""Keys of a training: known, renamed, refused with a hint."""

from pathlib import Path

import pytest
from trl.trainer.sft_config import SFTConfig

from finetune.keys import parse

NEEDED = ["--model_name_or_path", "m", "--dataset_name", "rows.jsonl", "--output_dir", "out"]


def parsed(*arguments: str):
    return parse(
        SFTConfig,
        [*NEEDED, *arguments],
        method="sft",
        fixed={"loss_type": "nll"},
        prog="mull-finetune sft",
    )


def test_a_file_and_the_command_line_which_wins(tmp_path: Path):
    file = tmp_path / "x.yaml"
    file.write_text(
        "lora_rank: 16\ncutoff_len: 512\nmicro_batch_size: 2\nlearning_rate: 1e-4\n"
        "finetuning_type: lora\nlora_target: [q_proj, v_proj]\nwarmup_ratio: 0.1\npacking: true\n"
    )
    keys = parsed("--config", str(file), "--max-length", "256", "--no_packing")
    assert (keys.model.lora_r, keys.training.max_length) == (16, 256)
    assert keys.training.per_device_train_batch_size == 2
    assert keys.training.learning_rate == 1e-4
    assert keys.model.lora_target_modules == ["q_proj", "v_proj"]
    assert keys.training.warmup_steps == 0.1
    assert keys.training.packing is False
    assert keys.task.peft_method == "lora"
    assert keys.said["max_length"] == "256"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--lora_rnak", "8"), "there is no key 'lora_rnak'; did you mean 'lora_r'?"),
        (("--push_to_hub", "true"), "'push_to_hub' is not used: adapters are published as folders"),
        (("--use_vllm",), "'use_vllm' is not used"),
        (("--template", "qwen"), "the model's own chat template is used"),
        (("--max_steps", "many"), "invalid int value: 'many'"),
        (("--peft_method", "adalora"), "invalid choice"),
        (("stray",), "['stray']"),
        (("--replay_fraction", "1.5"), "'replay_fraction' is a share"),
        (("--datasets", "[]"), "say 'dataset_name', or 'datasets'"),
        (("--config", "/nowhere.yaml"), "cannot read /nowhere.yaml"),
        (("--loss-type=dft",), "'loss_type' is what makes it sft: nll"),
        (("--label_good", "+"), "'label_good' is a key of verifier, not of sft"),
        (("--truncation_mode", "keep_end"), "'truncation_mode' is not used"),
        (("--resume_adapter", "a", "--lora_r", "8"), "the adapter to go on with decides lora_r"),
        (("--finetuning_type", "full"), "there is no key 'finetuning_type'"),
    ],
)
def test_what_is_unknown_or_would_do_nothing_is_refused(arguments, words):
    with pytest.raises(SystemExit) as refused:
        parsed(*arguments)
    assert words in str(refused.value)
