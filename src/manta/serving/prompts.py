"""From what a client sends to token ids: chat templates, tokenizers, and the tokens that end an answer."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from manta.data.chat import without_markers
from manta.data.tokenize import load_tokenizer, stop_tokens
from manta.serving.catalog import Model, Weights


class PromptError(Exception):
    """A prompt that the model cannot be given; the message is for the client."""


class Prompter:
    """Makes prompts for one model."""

    def __init__(self, model: Model, weights: Weights) -> None:
        self.model = model
        self.tokenizer: Any = load_tokenizer(model.tokenizer, weights.trust_remote_code)
        self._one_at_a_time = threading.Lock()  # a tokenizer keeps state while it encodes
        own = self.tokenizer.chat_template
        own = own.get("default") if isinstance(own, dict) else own
        template = model.chat_template or own
        self.template = without_markers(template) if template else None
        stops = stop_tokens(weights.source, self.tokenizer)
        ids: Any = self.tokenizer.convert_tokens_to_ids(stops)
        self.stop_ids = frozenset(ids)

    @property
    def mode(self) -> str:
        """How the model is used to be asked: in conversations ("chat"), or with texts of its own form ("text")."""
        return "chat" if self.template and not self.model.prompt_template else "text"

    def chat(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> list[int]:
        """A conversation up to where the assistant speaks. Raises PromptError if the template has or takes no such."""
        if self.template is None:
            hint = f" Its prompts were written as {self.model.prompt_template!r}." if self.model.prompt_template else ""
            raise PromptError(f"{self.model.name} has no chat template: ask it through /v1/completions.{hint}")
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=self.template,
                add_generation_prompt=True,
                tokenize=False,
                **variables,
            )
        except Exception as error:  # templates raise what they like
            raise PromptError(f"the chat template of {self.model.name} refuses the conversation: {error}") from error
        return self.text(text, special=False)

    def text(self, text: str, special: bool = True) -> list[int]:
        """A text, with the special tokens that the tokenizer puts around one. Raises PromptError if it is empty."""
        with self._one_at_a_time:
            ids: list[int] = self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return self.ids(ids)

    def ids(self, ids: list[int]) -> list[int]:
        """Token ids as they are. Raises PromptError if there are none, or one is not in the vocabulary."""
        if not ids:
            raise PromptError("the prompt is empty")
        if any(not 0 <= token < len(self.tokenizer) for token in ids):
            raise PromptError(f"the prompt holds a token id that is not in 0 … {len(self.tokenizer) - 1}")
        return ids
