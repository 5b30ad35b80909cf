"""Settings of the data: where rows come from, what a row means, and which findings about them stop a run."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

Format = Literal["auto", "template", "alpaca", "prompt_completion", "messages", "conversations", "text"]
Level = Literal["error", "warning", "off"]


@lru_cache(maxsize=256)
def template_fields(template: str) -> tuple[str, ...]:
    """Field names in `template`, in order: `"Q: {question}"` → `("question",)`. Raises ValueError if malformed."""
    fields: list[str] = []
    for _, name, spec, conversion in string.Formatter().parse(template):
        if name is None:
            continue
        if not name.isidentifier() or spec or conversion:
            raise ValueError(f"{{{name}}} is not a plain field name; write {{field}}, and {{{{ }}}} for literal braces")
        fields.append(name)
    return tuple(fields)


def parse_json(value: Any) -> Any:
    """A flag's text as JSON; anything else as it is. Raises ValueError if it is not JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error}); put it in single quotes, with double quotes within") from error


def without_password(place: str) -> str:
    """`place`, unless it is a URL with a password, which would be written into every run's files. Raises ValueError."""
    if urlsplit(place).password is not None:
        raise ValueError(
            "holds a password, which would be written into the run's files; download the file first, or use a store "
            "whose client takes credentials from the environment, such as s3://"
        )
    return place


def explain(problem: Any, show: bool = True) -> str:
    """One of pydantic's errors as a line, with the value given if `show`."""
    where = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    show = show and where != "notify"  # which may hold a secret
    given = re.sub(r"//[^/@\s]*@", "//…@", repr(problem["input"]))  # a URL's password
    hint = {"float": "a number such as 5e-5 or 0.1", "int": "a whole number such as 100", "bool": "true or false"}
    write = hint.get(problem["type"].removesuffix("_parsing").removesuffix("_type"), "")
    given = f" (got {given})" if show else ""
    return f"{where}: {message}{given}{f'. Write {write}.' if write else ''}" if where else message


class HFDatasetConfig(BaseModel):
    """Where the rows come from and how a row becomes an input (masked) and an output (trained)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    dataset_name: str = Field(
        "cognitivecomputations/dolphin",
        min_length=1,
        description="Hub name, .json/.jsonl/.csv/.parquet file (.gz too), folder of them or of save_to_disk, or URL",
    )
    dataset_config: str | None = Field(None, description="Subset of a hub dataset, such as flan1m-alpaca-uncensored")
    split: str = Field("train", min_length=1, description="Which split of the source is divided into ours")
    train_split_ratio: float = Field(0.9, gt=0, le=1, description="Share of rows to train on; 1.0 means no evaluation")
    val_test_split_ratio: float = Field(0.5, ge=0, le=1, description="Of the other rows, the test split's share")
    format: Format = Field(
        "auto",
        description="template, alpaca, prompt_completion, messages, conversations, text; auto: by template and columns",
    )
    input_template: str = Field(
        "### Instruction:\n{instruction}\n### Input:\n{input}\n### Response:\n",
        description="Prompt of a row, with {field}s; \\n and \\t are understood",
    )
    output_template: str = Field(
        "{output}", min_length=1, description="Answer of a row, with {field}s: what is trained"
    )
    field_mapping: dict[str, str] = Field(
        default_factory=dict, description='JSON: template field → column, such as {"input": "context"}'
    )
    chat: bool = Field(
        False, description="Put input and output through the chat template, as a user's and an assistant's turn"
    )
    train_on: Literal["all", "last"] = Field(
        "all", description="Of a conversation: train all of the assistant's turns, or the last one"
    )
    weight: float = Field(1.0, gt=0, description="How often a training row is seen in an epoch; 0.5: half of the rows")
    mixture: tuple[dict[str, Any], ...] = Field(
        (), description="JSON: several datasets, each with the settings in which it differs, such as a weight"
    )
    num_proc: int = Field(8, ge=1, description="Most processes that prepare data at once")

    @field_validator("input_template", "output_template")
    @classmethod
    def _check_template(cls, template: str) -> str:
        # A shell hands over backslash and n as two characters; nobody means those two.
        template = template.replace("\\n", "\n").replace("\\t", "\t")
        template_fields(template)
        return template

    _check_place = field_validator("dataset_name")(without_password)

    @field_validator("field_mapping", "mixture", mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        return parse_json(value)

    @model_validator(mode="after")
    def _check_mapping(self) -> Self:
        fields = template_fields(self.input_template) + template_fields(self.output_template)
        if unused := set(self.field_mapping) - set(fields):
            raise ValueError(
                f"field_mapping maps {sorted(unused)}, which neither template uses (they use {list(fields)})"
            )
        return self

    @model_validator(mode="after")
    def _check_mixture(self) -> Self:
        for number, part in enumerate(self.mixture):
            if wrong := set(part) & OF_THE_WHOLE:
                raise ValueError(f"mixture[{number}] sets {sorted(wrong)}, which the datasets have in common")
            if "dataset_name" not in part:
                raise ValueError(f"mixture[{number}] has no dataset_name")
            try:
                self._part(part)
            except ValidationError as error:
                reasons = "; ".join(
                    ": ".join([*map(str, e["loc"]), e["msg"].removeprefix("Value error, ")]) for e in error.errors()
                )
                raise ValueError(f"mixture[{number}]: {reasons}") from error
        return self

    def parts(self) -> list[HFDatasetConfig]:
        """The datasets to read: those of the mixture, each with the settings it shares, or this one alone."""
        return [self._part(part) for part in self.mixture] or [self]

    def has_own_templates(self) -> bool:
        """Whether the user wrote a template or a mapping, which says what a row means."""
        fields = type(self).model_fields
        return bool(self.field_mapping) or any(
            getattr(self, name) != fields[name].default for name in ("input_template", "output_template")
        )

    def _part(self, part: Mapping[str, Any]) -> HFDatasetConfig:
        return HFDatasetConfig.model_validate({**self.model_dump(exclude={"mixture"}), **part})


# What a mixture's datasets cannot have each for itself.
OF_THE_WHOLE = frozenset(("mixture", "train_split_ratio", "val_test_split_ratio", "num_proc"))


class LintConfig(BaseModel):
    """What happens when prepared data looks wrong: `error` stops before any worker starts, `warning` says so."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    no_trained_token: Level = Field("warning", description="Rows of which nothing would be trained (left out)")
    stop_not_trained: Level = Field("error", description="The answer does not end in a token that ends generation")
    boundary_split: Level = Field("warning", description="A token would span prompt and answer (tokenized apart)")
    content_lost: Level = Field("error", description="The chat template left out content, reasoning, tools or calls")
    serving_differs: Level = Field("error", description="The prompt in training is not what the model is served")
    trained_share: Level = Field("warning", description="Share of trained tokens that no good template gives")
    duplicates: Level = Field("warning", description="Equal rows in the training split")
    overlap: Level = Field("warning", description="Training rows that are in the validation or test split too")
    truncated: Level = Field("warning", description="More than `truncated_above` of the rows were cut")
    truncated_above: float = Field(0.05, ge=0, le=1, description="Share of cut rows that `truncated` allows")
    trained_share_below: float = Field(0.005, ge=0, le=1, description="Least share of tokens that are trained")
