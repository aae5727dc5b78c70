"""Structured output: the JSON schema of `--schema`, and the check of answers against it by the jsonschema package."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from capcli.errors import CapcliError, ImageError, UsageError
from capcli.text import printable

_FENCE = re.compile(r"\A```(?:json)?\s*(.*?)\s*```\Z", re.DOTALL)


class AnswerSchema:
    """A JSON schema. Raises UsageError for a file that has none, and CapcliError where jsonschema is not installed."""

    def __init__(self, path: str) -> None:
        try:
            from jsonschema.exceptions import SchemaError
            from jsonschema.validators import validator_for
            from referencing import Registry
        except ImportError as error:
            raise CapcliError(f"--schema needs {error.name or 'jsonschema'}: pip install 'capcli[endpoint]'") from None
        self.content = read_schema(path)
        kind = validator_for(self.content)
        try:
            kind.check_schema(self.content)
        except SchemaError as error:
            raise UsageError(f"--schema {printable(path)} is no JSON schema: {printable(error.message)}") from None
        self._validator = kind(self.content, registry=Registry())  # an empty registry: no reference is downloaded

    @property
    def sha256(self) -> str:
        """The hash of the schema, whatever its white space and the order of its keys."""
        return hashlib.sha256(json.dumps(self.content, sort_keys=True).encode()).hexdigest()

    def checked(self, text: str) -> str:
        """The JSON of an answer on one line, without a Markdown fence. Raises ImageError where it does not follow the schema."""
        fenced = _FENCE.match(text)
        try:
            value = json.loads(fenced[1] if fenced else text)
        except (ValueError, RecursionError) as error:
            raise ImageError("schema", f"the answer is not JSON: {error}") from None
        try:
            wrong = next(self._validator.iter_errors(value), None)
        except Exception as error:  # a reference that cannot be resolved: the package has several exceptions for it
            raise CapcliError(f"--schema cannot be applied: {printable(str(error))}") from None
        if wrong is not None:
            raise ImageError("schema", f"the answer does not follow --schema: {wrong.json_path}: {wrong.message[:200]}")
        return json.dumps(value, ensure_ascii=False)


def read_schema(path: str) -> dict[str, Any]:
    """The JSON object in a file. Raises UsageError."""
    try:
        with open(path, "rb") as file:
            content = json.loads(file.read())
    except OSError as error:
        raise UsageError(f"--schema {printable(path)} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--schema {printable(path)} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"--schema {printable(path)} has no JSON object")
    return content
