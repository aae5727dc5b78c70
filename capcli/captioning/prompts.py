"""Prompts with fields: `{tags}` in a prompt stands for the value of `tags` in the metadata beside the image."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from string import Formatter

from capcli.annotations.metadata import MetadataColumn
from capcli.errors import ImageError, UsageError
from capcli.records import Entry
from capcli.text import clean, listed

DEFAULT_PROMPT = "Describe this image in one sentence."


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """A prompt in parts: pieces of text, each followed by a field, or by None at the end."""

    parts: tuple[tuple[str, str | None], ...]

    @classmethod
    def parse(cls, text: str) -> PromptTemplate:
        """The template of a prompt in which `{name}` is a field, and `{{` and `}}` are braces. Raises UsageError."""
        try:
            parts = list(Formatter().parse(text))
        except ValueError as error:
            raise UsageError(f"--prompt: {error}; write {{{{ and }}}} for braces that are part of the text") from None
        for _, field, form, conversion in parts:
            if field is not None and (form or conversion or not field.strip()):
                raise UsageError(
                    f"--prompt: {{{field}…}} is not the name of a field; write {{{{ and }}}} for braces that are part of the text"
                )
        return cls(tuple((piece, field) for piece, field, _, _ in parts))

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(field for _, field in self.parts if field is not None))

    def filled(self, values: dict[str, str]) -> str:
        return "".join(piece + ("" if field is None else values[field]) for piece, field in self.parts)


class Prompts:
    """The prompts of a run's images. Raises UsageError for a `text` that is no template."""

    def __init__(self, text: str) -> None:
        self._template = PromptTemplate.parse(text)
        self._columns = {field: MetadataColumn(field, prompt_text, required=False) for field in self._template.fields}

    def prepared(self, entries: Iterable[Entry]) -> Iterable[Entry]:
        """The entries, with their prompts where the prompt has fields; without one where the metadata lacks a value."""
        if not self._columns:
            return entries
        return (replace(entry, prompt=self._prompt(entry.path)) for entry in entries)

    def _prompt(self, path: str) -> str | None:
        values = {field: column.of(path) for field, column in self._columns.items()}
        return self._template.filled(values) if all(values.values()) else None

    def of(self, prepared: str | None) -> str:
        """The prompt of an image whose entry was `prepared`. Raises ImageError where the metadata lacks a value."""
        if not self._columns:
            return self._template.filled({})
        if prepared is None:
            names = " or ".join(f"{{{field}}}" for field in self._columns)
            raise ImageError("missing-field", f"the metadata beside the image has no value for {names} in the prompt")
        return prepared


def prompt_text(value: object) -> str:
    """A cell of metadata as text for a prompt: a list, or a list in JSON, becomes its items, separated by commas."""
    if hasattr(value, "tolist"):  # NumPy's array
        value = value.tolist()
    if isinstance(value, str):
        items = listed(value)
        value = value if items is None else items
    if isinstance(value, list | tuple):
        return ", ".join(text for item in value if item is not None and (text := clean(str(item))))
    return "" if value is None or value != value else clean(str(value))  # only NaN differs from itself
