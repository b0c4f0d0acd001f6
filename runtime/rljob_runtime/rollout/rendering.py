"""Between an environment's text and the model's tokens. A model turn is never tokenised again: only new text is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from rljob_api.errors import RljobError
from rljob_runtime.environments.base import Message

_PROBE = "rljob-turn"
"""Stands for a model turn when the template's text around one is looked for."""


class Renderer:
    """Renders prompts and observations with the model's chat template, or as plain text where there is none."""

    def __init__(self, directory: Path) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(directory)
        self._has_template = bool(self._tokenizer.chat_template)
        end = self._tokenizer.eos_token_id
        self.stop_token_ids: tuple[int, ...] = () if end is None else (int(end),)

    def first(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Tokens of the first prompt, up to where the model's turn begins."""
        if not self._has_template:
            begin = self._tokenizer.bos_token_id
            start = () if begin is None else (int(begin),)
            return (*start, *self._encode("".join(message.content for message in messages)))
        return self._encode(self._template([*map(_chat, messages)], generate=True))

    def after_turn(self, observation: str, *, ended: bool) -> tuple[int, ...]:
        """Tokens between a model turn and the next one.

        Args:
            observation: what the environment said.
            ended: whether the model closed its turn itself; else the template's closing is added first.
        """
        if not self._has_template:
            return self._encode(observation)
        opening = [{"role": "user", "content": "."}, {"role": "assistant", "content": _PROBE}]
        whole = self._template([*opening, {"role": "user", "content": observation}], generate=True)
        rest = whole.split(_PROBE, 1)[1]
        closing = self._tokenizer.eos_token or ""
        if ended and closing and rest.startswith(closing):
            rest = rest[len(closing) :]
        return self._encode(rest)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of a model turn without special tokens."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    def _template(self, messages: list[dict[str, str]], *, generate: bool) -> str:
        text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        return text

    def _encode(self, text: str) -> tuple[int, ...]:
        ids = tuple(int(token) for token in self._tokenizer.encode(text, add_special_tokens=False))
        if not self._has_template:
            # A character tokenizer turns what it does not know into padding, which would be learned from in silence.
            pad = self._tokenizer.pad_token_id
            if pad in ids or len(ids) != len(text):
                unknown = sorted({letter for letter in text if self._tokenizer.convert_tokens_to_ids(letter) == pad})
                raise RljobError(
                    f"the tokenizer does not know the characters {unknown} of {text[:60]!r}: "
                    "add them to spec.model.random.alphabet"
                )
        return ids


def _chat(message: Message) -> dict[str, str]:
    return {"role": message.role, "content": message.content}
