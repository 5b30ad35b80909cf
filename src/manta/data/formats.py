"""What a row means: a prompt and an answer, or a conversation. Formats are told by columns, or said in the config."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from manta.data.lines import BadRow
from manta.data.source import Row, Source
from manta.dataset_config import Format, HFDatasetConfig, template_fields
from manta.errors import ConfigError

Objective = Literal["sft", "cpt"]
Message = dict[str, Any]

# Names of roles in the wild → the ones that chat templates know.
_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatgpt", "bing", "bard", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response", "function_response", "ipython"), "tool"),
}
REASONING = ("reasoning_content", "reasoning", "thinking")


class Pair(NamedTuple):
    """A prompt, which is masked, and an answer, which is trained."""

    input: str
    output: str


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates take them; `trained` are the indices of the assistant's messages to train on."""

    messages: list[Message]
    trained: tuple[int, ...]
    tools: list[dict[str, Any]] | None = None


def detect(source: Source, objective: Objective) -> Format:
    """The format of a source: as the user said, else by templates that are the user's own, else by the columns.

    Raises ConfigError if plain text would be trained on without `--objective cpt`, or nothing fits.
    """
    config, columns = source.config, set(source.columns)
    found = config.format
    if found == "auto":
        found = _by_columns(source) if objective == "sft" and not config.has_own_templates() else "template"
        if objective == "cpt" and "text" in columns and not config.has_own_templates():
            found = "text"
    if found == "text" and objective == "sft":
        raise ConfigError(
            f"{config.dataset_name} holds plain text, of which every token is trained: --objective cpt. To train on "
            "answers only, say what is prompt and what is answer: --hfdc_input_template, --hfdc_output_template."
        )
    if objective == "cpt" and (source.config.chat or found in ("messages", "conversations", "prompt_completion")):
        what = "chat" if source.config.chat else f"The format {found}"
        raise ConfigError(f"{what} is trained on with --objective sft; cpt takes text or a template.")
    _check_columns(source, found, objective)
    return found


def is_chat(found: Format, source: Source) -> bool:
    """Whether rows of this format go through the chat template."""
    if found == "prompt_completion":
        return source.config.chat or any(map(_both_messages, source.examples))
    return found in ("messages", "conversations") or (source.config.chat and found != "text")


def reader(found: Format, config: HFDatasetConfig, objective: Objective) -> Callable[[Row], Pair | Conversation]:
    """What turns a row of a format into a Pair or a Conversation. It raises BadRow with the reason."""
    if found in ("messages", "conversations"):
        return lambda row: conversation(row.get("messages") or row.get("conversations"), row, config.train_on)
    if found == "prompt_completion":
        return lambda row: _prompt_completion(row, config)
    if found == "text":
        return lambda row: Pair("", _text(row.get("text")))

    def templated(row: Row) -> Pair | Conversation:
        prompt, answer = render(config, row, objective)
        if not config.chat:
            return Pair(prompt, answer)
        if found == "alpaca" and not config.has_own_templates():
            asked = (_text(row.get("instruction")), _text(row.get("input")))
            prompt = "\n".join(part for part in asked if part)
        return _two_turns(prompt, answer)

    return templated


def check_templates(source: Source, objective: Objective, optional: Collection[str] = ()) -> None:
    """Raises ConfigError if a template names a field that no column provides."""
    config, columns = source.config, list(source.columns)
    templates = {"output_template": config.output_template}
    if objective == "sft":
        templates["input_template"] = config.input_template
    for name, template in templates.items():
        for field in template_fields(template):
            column = config.field_mapping.get(field, field)
            if column not in columns and column not in optional:
                nearest = difflib.get_close_matches(column, columns, n=1)
                hint = (
                    f"Did you mean {nearest[0]}?"
                    if nearest
                    else "Change the template, or map it: --hfdc_field_mapping."
                )
                asked = f"{{{field}}}" if column == field else f"{{{field}}}, mapped to the column {column}"
                raise ConfigError(f"{name} asks for {asked}, but the data has the columns {columns}. {hint}")


def render(config: HFDatasetConfig, row: Row, objective: Objective) -> tuple[str, str]:
    """`row` through the templates: (input, output). Continual pre-training has no input."""
    inputs = "" if objective == "cpt" else _fill(config.input_template, config, row)
    return inputs, _fill(config.output_template, config, row)


def conversation(
    messages: Any, row: Row, train_on: str = "all", also_trained: Callable[[int], bool] = lambda index: True
) -> Conversation:
    """Check and normalise messages in OpenAI's form or in from/value form. Raises BadRow."""
    messages = _from_json(messages)
    if not isinstance(messages, list) or not messages:
        raise BadRow("no messages")
    clean: list[Message] = []
    wanted: list[int] = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise BadRow(f"message {index + 1} is not an object")
        clean.append(_message(message, index))
        if clean[-1]["role"] == "assistant" and _is_trained(message) and also_trained(index):
            wanted.append(index)
    roles = [message["role"] for message in clean]
    if "system" in roles[1:]:
        raise BadRow("a system message after the first" if roles[0] != "system" else "two system messages")
    if roles.count("user") == 0:
        raise BadRow("no user message")
    if not wanted:
        raise BadRow("no assistant message" if "assistant" not in roles else "no message to train on")
    if train_on == "last":
        wanted = wanted[-1:]
    # What follows the last trained turn can change no prediction that is trained.
    return Conversation(clean[: wanted[-1] + 1], tuple(wanted), _tools(row))


def _by_columns(source: Source) -> Format:
    columns, first = set(source.columns), source.examples[0]
    if "messages" in columns:
        return "messages"
    if "conversations" in columns:
        turns = _from_json(first.get("conversations"))
        has_roles = isinstance(turns, list) and turns and isinstance(turns[0], Mapping) and "role" in turns[0]
        return "messages" if has_roles else "conversations"
    if {"prompt", "completion"} <= columns:
        return "prompt_completion"
    if {"instruction", "output"} <= columns:
        return "alpaca"
    return "text" if columns == {"text"} else "template"


def _check_columns(source: Source, found: Format, objective: Objective) -> None:
    """Raises ConfigError if a template or a format names a field that no column provides."""
    columns = list(source.columns)
    needed = {"messages": [["messages", "conversations"]], "conversations": [["conversations", "messages"]]}
    needed |= {"prompt_completion": [["prompt"], ["completion"]], "text": [["text"]]}
    if found in needed:
        for either in needed[found]:
            if not set(either) & set(columns):
                raise ConfigError(f"The format {found} needs a column {either[0]}, but the data has {columns}.")
        return
    check_templates(source, objective, optional={"input"} if found == "alpaca" else set())


def _prompt_completion(row: Row, config: HFDatasetConfig) -> Pair | Conversation:
    both = _both_messages(row)
    if both:
        return conversation([*both[0], *both[1]], row, config.train_on, lambda index: index >= len(both[0]))
    prompt, completion = row.get("prompt"), row.get("completion")
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise BadRow("prompt and completion must be two texts or two lists of messages")
    return _two_turns(prompt, completion) if config.chat else Pair(prompt, completion)


def _both_messages(row: Row) -> tuple[list[Any], list[Any]] | None:
    """Prompt and completion where both are messages, or text that holds them; any other JSON is text as it stands."""
    prompt, completion = (_from_json(row.get(name)) for name in ("prompt", "completion"))
    if not (prompt and isinstance(prompt, list) and completion and isinstance(completion, list)):
        return None
    is_text = isinstance(row["prompt"], str) or isinstance(row["completion"], str)
    have_roles = all(isinstance(each, Mapping) and ("role" in each or "from" in each) for each in prompt + completion)
    return (prompt, completion) if have_roles or not is_text else None


def _two_turns(prompt: str, answer: str) -> Conversation:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return conversation(turns, {})


def _message(message: Row, index: int) -> Message:
    said = message.get("role", message.get("from"))
    role = _ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise BadRow(f"message {index + 1} has the unknown role {_short(said)}")
    content = _content(message.get("content", message.get("value")), index)
    clean: Message = {"role": role, "content": content}
    calls = _from_json(message.get("tool_calls"))
    if said == "function_call":  # as ShareGPT writes it
        calls, clean["content"] = [_from_json(content)], ""
    elif not calls and message.get("function_call"):  # as OpenAI wrote it before tool_calls
        calls = [_from_json(message["function_call"])]
    if calls:
        clean["tool_calls"] = [_tool_call(call, index) for call in _as_list(calls, index)]
    elif role in ("user", "assistant") and not content.strip():
        raise BadRow(f"message {index + 1} ({role}) has no content")
    for name in REASONING:  # transformers gives a template each of these names
        if isinstance(message.get(name), str) and message[name].strip():
            clean["reasoning_content"] = message[name]
            break
    for name in ("name", "tool_call_id"):
        if isinstance(message.get(name), str):
            clean[name] = message[name]
    return clean


def _content(content: Any, index: int) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    if all(
        isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts
    ):
        return "".join(part["text"] for part in parts)
    raise BadRow(f"message {index + 1} has content that is not text")


def _tool_call(call: Any, index: int) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRow(f"message {index + 1} has a tool call without a function name")
    arguments = _from_json(function.get("arguments", {}))  # OpenAI writes them as text, chat templates want values
    clean = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return clean | ({"id": call["id"]} if isinstance(call.get("id"), str) else {})


def _is_trained(message: Row) -> bool:
    weight = message.get("weight", 1)
    weight = 1 if weight is None else weight
    if weight not in (0, 1):
        raise BadRow(f"a message has the weight {_short(weight)}; only 0 and 1 are known")
    return bool(weight) and message.get("train") not in (False, 0)


def _tools(row: Row) -> list[dict[str, Any]] | None:
    tools = _from_json(row.get("tools") or row.get("functions"))
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRow("tools is not a list of objects")
    if not all(isinstance(tool.get("function", tool), Mapping) for tool in tools):
        raise BadRow("the function of a tool is not an object")
    return [dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)} for tool in tools]


def _as_list(value: Any, index: int) -> list[Any]:
    if not isinstance(value, list):
        raise BadRow(f"message {index + 1} has tool_calls that are not a list")
    return value


def _from_json(value: Any) -> Any:
    """A list or object that a column holds as text, as CSV and Parquet files do; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _fill(template: str, config: HFDatasetConfig, row: Row) -> str:
    values = {field: _text(row.get(config.field_mapping.get(field, field))) for field in template_fields(template)}
    return template.format_map(values)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if not isinstance(value, dict | list):
        return str(value)
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except RecursionError as error:
        raise BadRow("nested too deeply") from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}…"


def describe(found: Format, source: Source) -> str:
    """For people: the format of a source, and how it is known."""
    if source.config.format != "auto":
        return f"{found}, as set"
    if source.config.has_own_templates():
        return f"{found}, as written in the config"
    return f"{found}, told by the columns {', '.join(source.columns)}"
