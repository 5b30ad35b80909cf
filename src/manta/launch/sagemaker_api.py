"""SageMaker's API: what a request must be like, checked without a network, and the calls. boto3 is loaded here only."""

from __future__ import annotations

import re
from typing import Any

from manta.errors import UserError

MISSING = "boto3 is not installed: pip install 'manta-train[sagemaker]'."


def check(operation: str, request: dict[str, Any]) -> None:
    """Compare a request with SageMaker's own description of it: names, types, and what botocore leaves to the service
    (patterns, values of enumerations, longest and most). Raises UserError with one line per breach.
    """
    try:
        import botocore.session
        from botocore.validate import ParamValidator
    except ImportError as error:
        raise UserError(MISSING) from error
    service = botocore.session.get_session().get_service_model("sagemaker")
    names = {re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower(): name for name in service.operation_names}
    shape = service.operation_model(names[operation]).input_shape
    report = ParamValidator().validate(request, shape)
    found = [report.generate_report()] if report.has_errors() else list(_breaches(shape, request, ""))
    if found:
        raise UserError("SageMaker would refuse this:\n" + "\n".join(f"  {line}" for line in found))


def call(operation: str, request: dict[str, Any], region: str | None) -> dict[str, Any]:
    """What SageMaker answers. Raises UserError with what it said."""
    try:
        import boto3
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError as error:
        raise UserError(MISSING) from error
    try:
        return getattr(boto3.client("sagemaker", region_name=region), operation)(**request)
    except (BotoCoreError, ClientError) as error:
        raise UserError(f"SageMaker refused {operation}: {error}") from error


def _breaches(shape: Any, value: Any, where: str) -> Any:
    if shape.type_name == "structure":
        for name, each in value.items():
            yield from _breaches(shape.members[name], each, f"{where}.{name}".lstrip("."))
    elif shape.type_name == "list":
        yield from _beyond(shape, len(value), where, "entries")
        for number, each in enumerate(value):
            yield from _breaches(shape.member, each, f"{where}[{number}]")
    elif shape.type_name == "map":
        yield from _beyond(shape, len(value), where, "entries")
        for key, each in value.items():
            yield from _breaches(shape.key, key, f"{where}.{key}")
            yield from _breaches(shape.value, each, f"{where}.{key}")
    elif shape.type_name == "string":
        yield from _beyond(shape, len(value), where, "characters")
        pattern = shape.metadata.get("pattern")
        if pattern and r"\p{" not in pattern and not re.fullmatch(pattern, value):
            yield f"{where}: {value} does not match {pattern}"
        if getattr(shape, "enum", None) and value not in shape.enum:
            yield f"{where}: SageMaker knows no {value}"
    elif shape.type_name in ("integer", "long"):
        yield from _beyond(shape, value, where, "")


def _beyond(shape: Any, size: int, where: str, what: str) -> Any:
    if size > shape.metadata.get("max", size):
        yield f"{where}: {size} {what}, at most {shape.metadata['max']}"
