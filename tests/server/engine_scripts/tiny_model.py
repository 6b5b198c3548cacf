"""Write a random Llama and two adapters; print what transformers answers with each, merged.

Usage: tiny_model.py FOLDER. One line of JSON: greedy tokens and log-probabilities by adapter.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

PROMPT = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46]
LENGTH = 12
RANK, ALPHA = 4, 8
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {"linear": LINEAR, "every": [*LINEAR, "embed_tokens", "lm_head"]}


def main(folder: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=512,
            initializer_range=0.3,
            tie_word_embeddings=False,
        )
    ).eval()
    model.save_pretrained(folder / "model")
    original = {name: weight.clone() for name, weight in model.state_dict().items()}
    answers = {"": greedy(model)}
    for adapter, targets in ADAPTERS.items():
        model.load_state_dict(original)
        write_adapter(model, folder / adapter, targets)
        answers[adapter] = greedy(model)
    print(json.dumps(answers))


def write_adapter(model: LlamaForCausalLM, folder: Path, targets: list[str]) -> None:
    """Write random matrices in peft's format, and merge them into `model`."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        module = name.removesuffix(".weight")
        if module.split(".")[-1] not in targets:
            continue
        embedding = module.endswith("embed_tokens")
        weight = parameter.data.t() if embedding else parameter.data
        a = torch.randn(RANK, weight.shape[1]) * 0.1
        b = torch.randn(weight.shape[0], RANK) * 0.1
        weight += (b @ a) * (ALPHA / RANK)
        names = (
            ["lora_embedding_A", "lora_embedding_B"]
            if embedding
            else ["lora_A.weight", "lora_B.weight"]
        )
        tensors |= {
            f"base_model.model.{module}.{names[0]}": a,
            f"base_model.model.{module}.{names[1]}": b,
        }
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@torch.inference_mode()
def greedy(model: LlamaForCausalLM) -> list[tuple[int, float]]:
    tokens = list(PROMPT)
    answer: list[tuple[int, float]] = []
    for _ in range(LENGTH):
        logprob, token = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1).max(-1)
        answer.append((int(token), float(logprob)))
        tokens.append(int(token))
    return answer


if __name__ == "__main__":
    main(Path(sys.argv[1]))
