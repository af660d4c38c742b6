"""What launchers that generate share: flags for prompts, sampler and output, and what they do."""

import time
from collections.abc import Callable
from typing import Any

from absl import flags

from common.data.chat import chat_tokens
from common.data.tokenizers import check_vocabulary, load_tokenizer
from common.errors import UserError
from common.generate import generate
from common.launch.prompts import read_prompts, refuse_existing_output, show, write_results
from common.models.loading import attach_tokenizer


class GenerationFlags:
    """The flags; a launcher adds its own to `values`.

    Args:
      package: whose `load` reads the checkpoint.
      prompt: what a prompt is, in the help's words.
      result: what the model writes.
      max_prompt_tokens: default of the flag; None: the model's longest.
      why: where that default comes from.

    Attributes:
      values: for `launch`.
      checkpoint, dtype: flags for the launcher's loading.
    """

    def __init__(
        self, package: str, *, prompt: str, result: str, max_prompt_tokens: int | None, why: str
    ):
        self.values = flags.FlagValues()
        own: dict[str, Any] = {"flag_values": self.values}
        self.checkpoint = flags.DEFINE_string(
            "checkpoint", None, f"what to load: anything {package}.load takes", required=True, **own
        )
        self._prompt = flags.DEFINE_multi_string("prompt", None, f"{prompt}; repeatable", **own)
        self._prompts = flags.DEFINE_string(
            "prompts", None, "a file: one prompt a line, or JSONL with a field 'prompt'", **own
        )
        self._output = flags.DEFINE_string(
            "output", None, "a JSONL file to write, besides printing", **own
        )
        self._max_new_tokens = flags.DEFINE_integer(
            "max_new_tokens", 64, "most tokens a prompt gets", **own
        )
        self._temperature = flags.DEFINE_float(
            "temperature", 0.0, "0 takes the likeliest token", **own
        )
        self._top_k = flags.DEFINE_integer(
            "top_k", None, "draw among the k likeliest tokens", **own
        )
        self._top_p = flags.DEFINE_float(
            "top_p", None, "draw among the likeliest tokens of mass p", **own
        )
        self._seed = flags.DEFINE_integer("seed", 0, "of the draws", **own)
        self._stop = flags.DEFINE_multi_string("stop", None, f"a text that ends {result}", **own)
        self._chat = flags.DEFINE_bool(
            "chat", False, "prompts are messages to a tuned model", **own
        )
        self.dtype = flags.DEFINE_enum(
            "dtype", "float32", ["float32", "bfloat16"], "compute dtype", **own
        )
        self._tokenizer = flags.DEFINE_string(
            "tokenizer", None, "a tokenizer's file, if not beside", **own
        )
        self._max_prompt_tokens = flags.DEFINE_integer(
            "max_prompt_tokens", max_prompt_tokens, f"refuse longer prompts; {why}", **own
        )

    def generate(
        self, load: Callable[[], Any], options: dict[str, Any] | None = None, *, joined: bool = True
    ) -> None:
        """Answers the prompts, prints the texts and writes the file.

        Args:
          load: the model; called when prompts and output are known to do.
          options: further arguments of `common.generate.generate`.
          joined: whether a text continues its prompt, or answers it.

        Raises:
          UserError: prompts, output, tokenizer or checkpoint do not do.
        """
        prompts = read_prompts(self._prompt.value, self._prompts.value)
        refuse_existing_output(self._output.value)
        model = load()
        if self._tokenizer.value is not None:
            attach_tokenizer(model, load_tokenizer(self._tokenizer.value))
            check_vocabulary(model.tokenizer, model.vocab_size)
        if model.tokenizer is None:
            raise UserError(
                f"there is no tokenizer beside {self.checkpoint.value}: name one with --tokenizer"
            )
        chat, stop = self._chat.value, self._stop.value
        texts = [chat_tokens(p, model.tokenizer) if chat else p for p in prompts]
        start = time.perf_counter()
        # The flags of the sampler keep the model's stop tokens beside the texts.
        results = generate(
            model,
            texts,
            self._max_new_tokens.value,
            self._temperature.value,
            self._top_k.value,
            self._top_p.value,
            self._seed.value,
            [*model.stop_tokens, *stop] if stop else None,
            max_prompt_tokens=self._max_prompt_tokens.value,
            **(options or {}),
        )
        seconds = time.perf_counter() - start
        show(prompts, results, joined=joined)
        if self._output.value is not None:
            write_results(self._output.value, prompts, results)
        count = sum(len(result.tokens) for result in results)
        print(f"{count} tokens in {seconds:.1f} s, compilation included")
