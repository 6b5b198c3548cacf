"""vLLM as it will serve the adapter: what it samples with one, and how likely it finds a text.

Adapters are versions: each load has a name and a number of its own, so that no cache is stale.
"""

import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Any, BinaryIO, Self, cast

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Sample:
    """An answer of the engine."""

    token_ids: list[int]
    logprobs: list[float]
    """Nats, of each token."""
    text: str


class Engine:
    """A base model, and adapters one after another. A context manager: it ends its processes.

    What those write to stderr is shown if the block ends in an error.
    """

    def __init__(
        self,
        model: str,
        *,
        rank: int,
        dtype: str = "float32",
        max_model_len: int | None = None,
        seed: int = 0,
    ) -> None:
        """`rank` is the highest of the adapters to come."""
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        self._heard = TemporaryFile("a+b")  # noqa: SIM115 - closed when the block ends
        try:
            with _stderr_to(self._heard):
                self._llm = _started(model, rank, dtype, max_model_len, seed)
        except BaseException:
            self._tell()
            raise
        self._loads = itertools.count(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._llm.llm_engine.engine_core.shutdown()
        if isinstance(error, Exception):
            self._tell()
        self._heard.close()

    def _tell(self) -> None:
        self._heard.seek(0)
        sys.stderr.write(self._heard.read().decode(errors="replace"))

    def load(self, folder: Path) -> Any:
        """An adapter, to be named in calls; the one before goes.

        Raises:
            Exception: vLLM refuses it; the engine lives.
        """
        from vllm.lora.request import LoRARequest

        number = next(self._loads)
        lora = LoRARequest(f"v{number}", number, str(folder.resolve()))
        engine = self._llm.llm_engine
        if number > 1:
            engine.remove_lora(number - 1)
        engine.add_lora(lora)
        return lora

    def logprobs(self, texts: Sequence[Sequence[int]], lora: Any | None) -> list[list[float]]:
        """Nats of each token after the first, of texts in token ids."""
        from vllm import SamplingParams

        read = self._llm.generate(
            [{"prompt_token_ids": list(ids)} for ids in texts],
            SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0),
            lora_request=lora,
            use_tqdm=False,
        )
        found: list[list[float]] = []
        for ids, one in zip(texts, read, strict=True):
            assert one.prompt_logprobs is not None
            rows = zip(ids[1:], one.prompt_logprobs[1:], strict=True)
            found.append([row[token].logprob for token, row in rows if row is not None])
        return found

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        lora: Any | None,
        *,
        n: int = 1,
        temperature: float,
        max_tokens: int,
        seed: int | None,
        tokenizer: PreTrainedTokenizerBase,
        **sampling: Any,
    ) -> list[list[Sample]]:
        """`n` answers to each prompt."""
        from vllm import SamplingParams

        answered = self._llm.generate(
            [{"prompt_token_ids": list(ids)} for ids in prompts],
            [
                SamplingParams(
                    n=1 if temperature == 0 else n,
                    temperature=temperature,
                    max_tokens=max_tokens,
                    seed=None if seed is None else seed + 1000 * at,
                    logprobs=0,
                    **sampling,
                )
                for at in range(len(prompts))
            ],
            lora_request=lora,
            use_tqdm=False,
        )
        return [[_sample(output, tokenizer) for output in one.outputs] for one in answered]


def _started(model: str, rank: int, dtype: str, max_model_len: int | None, seed: int) -> Any:
    import torch
    from vllm import LLM

    on_cpu: dict[str, Any] = {} if torch.cuda.is_available() else {"enforce_eager": True}
    if on_cpu:
        on_cpu["kv_cache_memory_bytes"] = 256 << 20
    return LLM(
        model=model,
        dtype=cast(Any, dtype),
        enable_lora=True,
        max_loras=1,
        max_lora_rank=next(r for r in (8, 16, 32, 64, 128, 256, 320, 512) if r >= rank),
        max_model_len=max_model_len,
        seed=seed,
        disable_log_stats=True,
        **on_cpu,
    )


@contextmanager
def _stderr_to(file: BinaryIO) -> Iterator[None]:
    """Of this process, and for good of those that it starts."""
    sys.stderr.flush()
    before = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(before, 2)
        os.close(before)


def _sample(output: Any, tokenizer: PreTrainedTokenizerBase) -> Sample:
    ids = list(output.token_ids)
    logprobs = [row[token].logprob for token, row in zip(ids, output.logprobs, strict=True)]
    return Sample(ids, logprobs, str(tokenizer.decode(ids, skip_special_tokens=True)))
