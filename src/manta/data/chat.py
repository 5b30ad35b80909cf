"""Conversations as text: rendered by the model's chat template, with the assistant's turns marked as trained.

Three ways to know what is the assistant's, best first: generation markers in the template itself; the training variant
that TRL keeps for the families it knows (https://huggingface.co/docs/trl/chat_templates); and, for any other template,
the difference that a turn makes to the text before it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from manta.data.formats import Conversation, Message
from manta.data.lines import BadRow
from manta.data.tokenize import Rendered
from manta.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Some templates write today's date. Prepared data must not depend on the day, so it is the one Llama 3.1 falls back to.
TODAY = datetime(2024, 7, 26)

_MARKER = re.compile(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}")
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_THINKING = re.compile(r"</?think>")


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template: what the model is `served` with, and what is `marked` for training, if anything.

    `variables` are the template's own (`enable_thinking`, …), in training and serving alike.
    """

    served: str
    marked: str | None
    name: str
    special_tokens: Mapping[str, Any]
    variables: Mapping[str, Any]

    @property
    def published(self) -> str:
        """What the tuned model's tokenizer carries: served as here unless a client sets the variables itself."""
        defaults = "".join(
            f"{{%- if {name} is not defined %}}{{%- set {name} = {value!r} %}}{{%- endif %}}\n"
            for name, value in self.variables.items()
        )
        return defaults + self.served

    def render(self, talk: Conversation, train_on: str = "all") -> Rendered:
        """The text of a conversation with the trained turns' characters. Raises BadRow where the template fails.

        With `train_on` "last" the prompt is what the model is served, to the letter, wherever the template allows it.
        """
        if train_on == "last" or self.marked is None:
            by_turns = self._by_turns(talk)
            if by_turns is not None:
                return by_turns
            if self.marked is None:
                raise BadRow(
                    "the chat template writes earlier text otherwise once more follows; give it {% generation %} marks"
                    + (" or train with --hfdc_train_on last" if train_on == "all" else "")
                )
        return self._by_markers(talk)

    def prompt(self, talk: Conversation, turn: int) -> str:
        """What the model is served when it is to write message `turn`."""
        return self._write(self.served, talk.messages[:turn], talk.tools, add_generation_prompt=True)[0]

    def serving_difference(self, talk: Conversation, rendered: Rendered) -> str | None:
        """Where the text before a trained turn is not what the model is served, for people; None if all agree."""
        for turn in talk.trained:
            served = self.prompt(talk, turn)
            answered = any(start <= len(served) < end for start, end in rendered.trained)
            if rendered.text.startswith(served) and answered:
                continue
            pairs = zip(served, rendered.text, strict=False)
            at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(served), len(rendered.text)))
            before = served[max(0, at - 30) : at]
            return (
                f"after {before!r} the model is served {served[at : at + 40]!r}, "
                f"and trained on {rendered.text[at : at + 40]!r}"
            )
        return None

    def lost(self, talk: Conversation, rendered: Rendered) -> str | None:
        """Something of the trained turns, or of the tools, that the template left out; None if all is there."""
        shown = " ".join(piece for piece, trained in rendered.pieces() if not trained)  # a call is no definition
        for tool in talk.tools or ():
            name = tool["function"].get("name")
            if isinstance(name, str) and name not in shown:
                return f"the tool {name}"
        text = " ".join(rendered.text[start:end] for start, end in rendered.trained)
        for turn in talk.trained:
            message = talk.messages[turn]
            if any(part.strip() not in text for part in _THINKING.split(message["content"])):
                return f"the content of message {turn + 1}"
            # Where the prompt opens the thoughts, as a template for reasoning may, they are not part of the answer.
            if (thoughts := message.get("reasoning_content")) and thoughts.strip() not in text:
                return f"the reasoning of message {turn + 1}"
            for call in message.get("tool_calls", ()):
                if call["function"]["name"] not in text:
                    return f"the tool call of message {turn + 1}"
        return None

    def _by_markers(self, talk: Conversation) -> Rendered:
        assert self.marked is not None
        text, stretches = self._write(self.marked, talk.messages, talk.tools, marks=True)
        turns = [index for index, message in enumerate(talk.messages) if message["role"] == "assistant"]
        if len(talk.trained) == len(turns):
            return Rendered(text, tuple(stretches), chat=True)
        if len(stretches) != len(turns):
            raise BadRow(f"the chat template marks {len(stretches)} turns of the assistant, and there are {len(turns)}")
        trained = [stretch for turn, stretch in zip(turns, stretches, strict=True) if turn in talk.trained]
        return Rendered(text, tuple(trained), chat=True)

    def _by_turns(self, talk: Conversation) -> Rendered | None:
        """Each trained turn as what it adds to its served prompt; None if a later turn changes an earlier one."""
        text, _ = self._write(self.served, talk.messages, talk.tools)
        trained = []
        for turn in talk.trained:
            prompt = self.prompt(talk, turn)
            until = text
            if turn + 1 < len(talk.messages):
                until, _ = self._write(self.served, talk.messages[: turn + 1], talk.tools)
            if not (until.startswith(prompt) and text.startswith(until)):
                return None
            trained.append((len(prompt), len(until)))
        return Rendered(text, tuple(trained), chat=True)

    @cached_property
    def _with_arguments_as_text(self) -> frozenset[str]:
        """Which of the two templates join tool arguments as text, and fail on anything else (DeepSeek V3's own)."""
        call = {"type": "function", "id": "call00001", "function": {"name": "f", "arguments": {"x": 1}}}
        called = {"role": "assistant", "content": "", "tool_calls": [call]}
        asked: list[Message] = [{"role": "user", "content": "?"}, called]
        failed = set()
        for template in filter(None, (self.served, self.marked)):
            try:
                self._render(template, asked, None)
            except Exception:
                failed.add(template)
        return frozenset(failed)

    def _write(
        self, template: str, messages: list[Message], tools: list[dict[str, Any]] | None, **how: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        """`_render` with tool arguments as the template wants them. Raises BadRow where it fails."""
        if any("tool_calls" in message for message in messages) and template in self._with_arguments_as_text:
            messages = [_with_text_arguments(message) for message in messages]
        try:
            return self._render(template, messages, tools, **how)
        except Exception as error:
            raise BadRow(f"the chat template refuses it: {error}") from error

    def _render(
        self,
        template: str,
        messages: list[Message],
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool = False,
        marks: bool = False,
    ) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        _compile(template).globals["strftime_now"] = TODAY.strftime
        texts: Any
        marked: Any
        texts, marked = render_jinja_template(  # type: ignore[str-unpack]
            conversations=[messages],
            tools=cast(Any, tools),
            chat_template=template,
            return_assistant_tokens_mask=marks,
            add_generation_prompt=add_generation_prompt,
            **{**self.special_tokens, **self.variables},
        )
        return texts[0], _joined(marked[0]) if marks else []


def load_chat_template(
    tokenizer: PreTrainedTokenizerBase, wanted: str | None, variables: Mapping[str, Any]
) -> ChatTemplate:
    """The chat template of a tokenizer, or `wanted`: a Jinja file or a family that TRL knows.

    Raises ConfigError if there is none or it is not valid Jinja.
    """
    own = _of_tokenizer(tokenizer)
    if wanted is None:
        if own is None:
            raise ConfigError(
                "The data holds conversations, but the tokenizer has no chat template. Give --chat_template a Jinja "
                f"file or one of: {', '.join(families())}."
            )
        served, marked, name = without_markers(own), *_training_variant(own)
    elif Path(wanted).is_file():
        try:
            text = Path(wanted).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"The chat template {wanted} cannot be read: {error}.") from error
        served, name = without_markers(text), f"file {wanted}"
        marked = text if _has_markers(text) else None
    elif wanted in families():
        folder = _trl_templates()
        served = (folder / f"{wanted}.jinja").read_text(encoding="utf-8")
        marked, name = (folder / f"{wanted}_training.jinja").read_text(encoding="utf-8"), f"{wanted} of TRL"
    else:
        raise ConfigError(
            f"chat_template {wanted} is neither a file nor a family that TRL has. Those are: {', '.join(families())}."
        )
    template = ChatTemplate(served, marked, name, tokenizer.special_tokens_map, variables)
    _check_syntax(template)
    return template


def without_markers(template: str) -> str:
    """A template that engines which know no `{% generation %}` can read, and that renders the same."""

    def plain(found: re.Match[str]) -> str:
        # A marker in a comment is only talked about. Any other trims the space beside its dash, as a comment does.
        return _MARKER.sub("", found[0]) if found[0].startswith("{#") else _MARKER.sub(r"{#\1 \2#}", found[0])

    return re.sub(f"{_COMMENT.pattern}|{_MARKER.pattern}", plain, template, flags=re.DOTALL)


def families() -> list[str]:
    """Model families of which TRL keeps a template with its training variant."""
    return sorted(
        path.name.removesuffix("_training.jinja")
        for path in _trl_templates().glob("*_training.jinja")
        if path.with_name(path.name.replace("_training", "")).exists()
    )


def _trl_templates() -> Path:
    import trl

    return Path(trl.__file__).parent / "chat_templates"


def _of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str | None:
    own: Any = tokenizer.chat_template
    return own.get("default") if isinstance(own, dict) else own


def _has_markers(template: str) -> bool:
    return _MARKER.search(_COMMENT.sub("", template)) is not None


def _training_variant(own: str) -> tuple[str | None, str]:
    if _has_markers(own):
        return own, "the tokenizer's own, which marks what is generated"
    folder = _trl_templates()
    for family in families():
        if (folder / f"{family}.jinja").read_text(encoding="utf-8") == own:
            return (folder / f"{family}_training.jinja").read_text(encoding="utf-8"), f"{family}, known to TRL"
    return None, "the tokenizer's own"


def _check_syntax(template: ChatTemplate) -> None:
    from jinja2 import TemplateSyntaxError

    for text in filter(None, (template.served, template.marked)):
        try:
            _compile(text)
        except TemplateSyntaxError as error:
            raise ConfigError(f"The chat template ({template.name}) is not valid Jinja: {error}.") from error


def _compile(template: str) -> Any:
    """The compiled template that transformers keeps and renders."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template(template)


def _joined(stretches: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Stretches without empty ones, and with those that touch made one: some templates mark a turn in parts."""
    joined: list[tuple[int, int]] = []
    for start, end in stretches:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        elif start < end:
            joined.append((start, end))
    return joined


def _with_text_arguments(message: Message) -> Message:
    calls = [
        {**call, "function": {**call["function"], "arguments": _as_text(call["function"]["arguments"])}}
        for call in message.get("tool_calls", ())
    ]
    return {**message, "tool_calls": calls} if calls else message


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
