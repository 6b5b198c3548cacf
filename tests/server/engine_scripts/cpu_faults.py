"""Provoke one fault of vLLM on CPU; print what came of it as one line of JSON.

Usage: cpu_faults.py {lora,seed,orphan} FOLDER [--stock] [--executor mp]. FOLDER is written by
`tiny_model.py`; `--stock` leaves vLLM as it is, to see the fault.
"""

import asyncio
import json
import os
from argparse import ArgumentParser, Namespace
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tiny_model import ADAPTERS, LENGTH, PROMPT
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs import tokens_input
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from server.local import cpu


@asynccontextmanager
async def engine(args: Namespace, **kwargs: object) -> AsyncIterator[AsyncLLM]:
    config = AsyncEngineArgs(
        model=f"{args.folder}/model",
        skip_tokenizer_init=True,
        dtype="float32",
        block_size=32,
        max_model_len=256,
        max_num_seqs=8,
        kv_cache_memory_bytes=16 << 20,
        enforce_eager=True,
        distributed_executor_backend=args.executor,
        worker_extension_cls="server.local.cpu.Guard",
        **kwargs,  # type: ignore[arg-type]
    ).create_engine_config()
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"  # the CPU platform has just reset it
    llm = AsyncLLM.from_vllm_config(config)
    try:
        yield llm
    finally:
        llm.shutdown(timeout=15)


async def answer(
    llm: AsyncLLM,
    request_id: str,
    prompt: list[int],
    adapter: LoRARequest | None = None,
    *,
    seed: int | None = None,
) -> list[tuple[int, float]]:
    """Tokens with log-probabilities: greedy, or sampled where there is a seed."""
    params = SamplingParams(
        temperature=0.0 if seed is None else 1.0,
        seed=seed,
        max_tokens=LENGTH,
        ignore_eos=True,
        detokenize=False,
        logprobs=0,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    async for output in llm.generate(
        tokens_input(prompt), params, request_id, lora_request=adapter
    ):
        completion = output.outputs[0]
        assert completion.logprobs is not None
        rows = zip(completion.token_ids, completion.logprobs, strict=True)
        return [(token, row[token].logprob) for token, row in rows if row is not None]
    raise AssertionError("no output")


async def likelihood(llm: AsyncLLM, request_id: str, adapter: LoRARequest | None) -> list[float]:
    """Log-probabilities of the prompt's own tokens; what follows keeps the batch together."""
    params = SamplingParams(
        max_tokens=LENGTH,
        ignore_eos=True,
        detokenize=False,
        prompt_logprobs=0,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    async for output in llm.generate(
        tokens_input(PROMPT), params, request_id, lora_request=adapter
    ):
        assert output.prompt_logprobs is not None
        rows = zip(PROMPT, output.prompt_logprobs, strict=True)
        return [row[token].logprob for token, row in rows if row is not None]
    raise AssertionError("no output")


async def lora(args: Namespace) -> object:
    """Each adapter and the base, alone and all in one batch that fills the slots."""
    adapters: dict[str, LoRARequest | None] = {"": None}
    for number, name in enumerate(ADAPTERS, start=1):
        adapters[name] = LoRARequest(name, number, f"{args.folder}/{name}")
    slots = len(ADAPTERS)
    async with engine(args, enable_lora=True, max_loras=slots, max_lora_rank=8) as llm:
        alone = {name: await answer(llm, name, PROMPT, it) for name, it in adapters.items()}
        order = [*adapters, *adapters]  # so that no adapter's rows are neighbours
        together = await asyncio.gather(
            *(answer(llm, f"{row}", PROMPT, adapters[name]) for row, name in enumerate(order))
        )
        pair = ["", "linear"]
        prompts = {
            "alone": [await likelihood(llm, name, adapters[name]) for name in pair],
            "together": await asyncio.gather(
                *(likelihood(llm, name, adapters[name]) for name in pair)
            ),
        }
    together = list(zip(order, together, strict=True))
    return {"alone": alone, "together": together, "prompts": prompts}


async def seed(args: Namespace) -> object:
    """Seeded requests with prompts longer than a step, and the same in steps that hold them."""
    prompts = [[(7 * row + 3 * column) % 128 for column in range(150)] for row in range(3)]
    answers: dict[str, object] = {}
    for name, tokens in {"chunked": 64, "whole": 512}.items():
        async with engine(args, max_num_batched_tokens=tokens) as llm:
            answers[name] = await asyncio.gather(
                *(answer(llm, f"{row}", prompt, seed=row) for row, prompt in enumerate(prompts))
            )
    return answers


async def orphan(args: Namespace) -> object:
    """Wait to be killed, with an engine that has answered after it was guarded."""
    async with engine(args) as llm:
        if not args.stock:
            assert all(await llm.collective_rpc("guard", args=(os.getpid(),)))
        await asyncio.sleep(1.5)
        print(json.dumps({"answer": await answer(llm, "", PROMPT)}), flush=True)
        await asyncio.sleep(600)


def main() -> None:
    parser = ArgumentParser()
    parser.add_argument("fault", choices=["lora", "seed", "orphan"])
    parser.add_argument("folder")
    parser.add_argument("--stock", action="store_true")
    parser.add_argument("--executor", choices=["uni", "mp"], default="uni")
    args = parser.parse_args()
    if not args.stock:
        cpu.mend()
    provoke = {"lora": lora, "seed": seed, "orphan": orphan}[args.fault]
    print(json.dumps(asyncio.run(provoke(args))), flush=True)


if __name__ == "__main__":
    main()
