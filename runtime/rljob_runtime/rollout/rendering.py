"""Text to tokens and back, without ever tokenising a model turn again.

The context of a trajectory is grown by appending: prompt, the sampled tokens as they are, the tokens of what the
template puts between two turns, sampled tokens, and so on. Tokenising the model's text again could give other tokens than
those it sampled, and then behavior log-probabilities would belong to tokens that are not in the sequence.

With a chat template, what follows a model turn is found by rendering [user, assistant MARK, user observation] with a
generation prompt and taking everything behind MARK. It begins with the template's end-of-turn token; that is left out
where the model sampled it itself. A turn that was cut off by its length gets it appended, as part of the observation.

Without a chat template contents are joined as they are: begin token + prompt, then answer, observation, answer ... A
turn that did not end by itself is followed by the observation all the same; an end token that the model sampled stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rljob_api.errors import EnvironmentFailure, RljobError
from rljob_runtime.environments.base import Message

_MARK = "ANSWERxMARKx0"


class Renderer:
    """Tokenizer and chat template of a model directory.

    Raises:
        RljobError: the directory holds no usable tokenizer, or one without an end token.
    """

    def __init__(self, tokenizer_dir: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(tokenizer_dir), local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise RljobError(f"{tokenizer_dir}: no tokenizer could be read: {error}") from error
        if not self._tokenizer.is_fast:
            raise RljobError(f"{tokenizer_dir}: the tokenizer has no tokenizer.json: convert it to a fast tokenizer")
        # Called directly: through transformers' own call a short text takes three times as long.
        self._backend: Any = self._tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        if self._tokenizer.eos_token_id is None:
            raise RljobError(
                f"{tokenizer_dir}: the tokenizer has no end token; model turns could only end by their length"
            )
        unknown = self._tokenizer.unk_token_id
        # GPT-2 and its kin name their end token so; byte-level, they know every character.
        self._unknown_token_id = None if unknown == self._tokenizer.eos_token_id else unknown
        self._has_template = self._tokenizer.chat_template is not None
        self.turn_end_token_id: int = self._find_turn_end() if self._has_template else self._tokenizer.eos_token_id

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a model turn: the end token, and the template's end-of-turn token where that is another."""
        return tuple(sorted({int(self._tokenizer.eos_token_id), self.turn_end_token_id}))

    def first(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Tokens of the first prompt, up to where the model's turn begins.

        Raises:
            EnvironmentFailure: the tokenizer has no token for a character, or the template refuses the messages.
        """
        if self._has_template:
            return self._encode(self._template(messages))
        begin = self._tokenizer.bos_token_id
        tokens = self._encode("".join(message.content for message in messages))
        return tokens if begin is None else (int(begin), *tokens)

    def after_turn(self, observation: str, model_turn_ended_with_eos: bool) -> tuple[int, ...]:
        """Tokens to append after a model turn, up to where the next one begins.

        `model_turn_ended_with_eos`: the last sampled token is `turn_end_token_id`.

        Raises:
            EnvironmentFailure: as `first`.
        """
        if not self._has_template:
            return self._encode(observation)
        tokens = self._encode(self._behind_mark(observation))
        if model_turn_ended_with_eos and tokens and tokens[0] == self.turn_end_token_id:
            return tokens[1:]
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special ones left out."""
        text: str = self._backend.decode(list(tokens), skip_special_tokens=True)
        return text

    def _find_turn_end(self) -> int:
        tokens = self._encode(self._behind_mark("x"))
        special = set(self._tokenizer.all_special_ids)
        special |= {i for i, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        return tokens[0] if tokens and tokens[0] in special else int(self._tokenizer.eos_token_id)

    def _behind_mark(self, observation: str) -> str:
        messages = (Message("user", "x"), Message("assistant", _MARK), Message("user", observation))
        _, found, behind = self._template(messages).partition(_MARK)
        if not found:
            raise RljobError(
                "the chat template leaves out the content of assistant messages: multi-turn contexts need it"
            )
        return behind

    def _template(self, messages: Sequence[Message]) -> str:
        from jinja2 import TemplateError

        chat = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text: str = self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            roles = ", ".join(message.role for message in messages)
            raise EnvironmentFailure(
                f"the model's chat template refuses messages of the roles {roles}: {error}"
            ) from error
        return text

    def _encode(self, text: str) -> tuple[int, ...]:
        if not text:
            return ()
        encoded = self._backend.encode(text, add_special_tokens=False)
        tokens: list[int] = encoded.ids
        covered = bytearray(len(text))
        for token, (start, end) in zip(tokens, encoded.offsets, strict=True):
            if token != self._unknown_token_id:
                covered[start:end] = b"\1" * (end - start)
        missing = sorted({c for c, is_covered in zip(text, covered, strict=True) if not is_covered})
        if any(character.isspace() for character in missing):
            # Byte-level tokenizers leave spaces out of their offsets though they keep them.
            kept = self._backend.decode(tokens, skip_special_tokens=False)
            missing = [character for character in missing if not (character.isspace() and character in kept)]
        if missing:
            shown = " ".join(repr(character) for character in missing[:8])
            raise EnvironmentFailure(
                f"the model's tokenizer has no token for {shown} in {text[:60]!r}: choose another environment or "
                "model, or add the characters to model.random.alphabet"
            )
        return tuple(tokens)
