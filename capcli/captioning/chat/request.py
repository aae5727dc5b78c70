"""The request of one image, in the format of the chat completions API."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from capcli.errors import UsageError
from capcli.options import GenerationOptions
from capcli.text import flag

# capcli's names of generation options, and the API's.
API_NAMES = {
    "max_new_tokens": "max_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "seed": "seed",
    "num_return_sequences": "n",
}
MAX_TOKENS = 1024  # of an answer, unless given: a server without a limit lets a loop run to the end of its context


@dataclass(frozen=True, slots=True)
class RequestTemplate:
    """What the requests of a run have in common. `sampling` has the API's names."""

    model: str
    system: str | None
    sampling: dict[str, Any]
    schema: dict[str, Any] | None = field(default=None, repr=False)

    def body(self, jpeg: npt.NDArray[np.uint8], prompt: str, *, logprobs: bool) -> bytes:
        """The body of the request for an image, the bytes of a JPEG file, uint8 [n]."""
        url = "data:image/jpeg;base64," + base64.b64encode(jpeg.data).decode("ascii")
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": prompt}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        body: dict[str, Any] = {"model": self.model, "messages": messages, **self.sampling, "stream": False}
        if logprobs:
            body["logprobs"] = True
        if self.schema is not None:
            named = {"name": "caption", "strict": True, "schema": self.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": named}
        return json.dumps(body).encode("ascii")


def sampling_of(given: GenerationOptions) -> dict[str, Any]:
    """The generation options by the API's names. Raises UsageError for those that it does not have."""
    values = {name: getattr(given, name) for name in GenerationOptions.__dataclass_fields__}
    values = {name: value for name, value in values.items() if value is not None}
    if values.get("do_sample") is False:  # the most likely tokens
        if "temperature" in values:
            raise UsageError("--no-do-sample and --temperature contradict each other: give one of them")
        del values["do_sample"]
        values["temperature"] = 0.0
    if unknown := [flag(name) for name in values if name not in API_NAMES]:
        known = ", ".join(map(flag, API_NAMES))
        raise UsageError(
            f"{', '.join(unknown)}: a server does not take this; with --endpoint there are {known} and --no-do-sample"
        )
    return {"max_tokens": MAX_TOKENS, **{API_NAMES[name]: value for name, value in values.items()}}
