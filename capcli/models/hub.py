"""The files of a captioner: a folder, the cache of earlier downloads, or a download from the hub."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from capcli import __version__
from capcli.errors import CapcliError, UsageError
from capcli.models.model_files import CONFIG, IncompleteError, ModelFiles, ModelListing, collect_files, list_model

COMMIT = re.compile("[0-9a-f]{40}")
Collect = Callable[[str, ModelListing, str | None], ModelFiles]  # as `collect_files`


class RefusedError(CapcliError):
    """The hub provided no files; those of an earlier download may still be used."""


class UnreachableError(RefusedError):
    """The hub did not respond."""


# What a failed download raises, by HTTP status or by the name of the exception's class or base class.
LOGIN = "log in with `hf auth login`"
GATED = f"{{model}} is gated: accept its terms at {{hub}}/{{model}}, then {LOGIN} or set HF_TOKEN."
UNKNOWN = "There is no folder {model} here, and no such model on the hub ({hub}): check the name."
PRIVATE = f" If the model is private, {LOGIN} or set HF_TOKEN."
UNREACHED = "The hub ({hub}) cannot be reached: "
NO_ROOM = "No room for {model} in {cache} ({reason}): free some space, or set HF_HOME to a larger disk."
DISK = "Cannot store {model} in {cache} ({reason}: {path}): set HF_HOME to a folder that can be written."
ERRORS: dict[int | str, tuple[type[CapcliError], str]] = {
    "GatedRepoError": (RefusedError, GATED),
    "RepositoryNotFoundError": (RefusedError, UNKNOWN + PRIVATE),
    "RevisionNotFoundError": (
        UsageError,
        "{model} has no revision {revision}: give a branch, tag or commit of {hub}/{model}.",
    ),
    401: (RefusedError, f"The hub ({{hub}}) refuses the token: {LOGIN}, or correct HF_TOKEN."),
    403: (RefusedError, "The hub ({hub}) denies access to {model}: use a token that has access (HF_TOKEN)."),
    429: (RefusedError, f"The hub ({{hub}}) allows no more requests for now: wait, or {LOGIN}."),
    "HfHubHTTPError": (UnreachableError, UNREACHED + "it responds with status {status}."),
    "JSONDecodeError": (UnreachableError, UNREACHED + "the server there is not a hub."),
    "no room": (CapcliError, NO_ROOM),
    "disk": (CapcliError, DISK),
    "Exception": (UnreachableError, UNREACHED + "{reason}."),
}


def find_model(
    model: str,
    revision: str | None = None,
    *,
    quiet: bool = False,
    take: Collect = collect_files,
    option: str = "--model",
) -> ModelFiles:
    """The files of the captioner `model`: a folder, or a name on the hub, which is downloaded into the hub's cache.

    `revision` is a branch, tag or commit of a hub model. Progress is shown on a terminal unless `quiet`. A hub that provides
    no files is not an error if the cache has the complete model. `take` collects the files of a model, or of a part of one;
    `option` is the option that names it. Raises UsageError for a wrong `model` or `revision`, CapcliError where the files
    cannot be obtained or are not those of a supported captioner.
    """
    folder = os.path.expanduser(model)
    if os.path.isdir(folder):
        if revision is not None:
            raise UsageError(f"--revision is for models on the hub, and {model} is a folder: leave it out.")
        return take(model, list_model(folder), None)
    if os.path.isfile(folder):
        raise UsageError(f"{model} is a file: {option} takes the folder that contains {CONFIG}, or a name on the hub.")
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        try_to_load_from_cache(model, CONFIG)  # called for its check of the name
    except HFValidationError as error:
        rule = "those are 'owner/name', of letters, digits, '-', '_' and '.'"
        raise UsageError(f"No such folder: {model!r}, and it cannot be a name on the hub: {rule}.") from error
    if constants.HF_HUB_OFFLINE:
        advice = f"HF_HUB_OFFLINE is set: unset it to download the model, or give {option} a folder."
        return cached(model, revision, take, advice)
    if revision is not None and COMMIT.fullmatch(revision):  # a commit never changes, so no request is needed
        with suppress(IncompleteError):
            return cached(model, revision, take)
    try:
        return download(model, revision, quiet, take)
    except UnreachableError as error:
        return cached(model, revision, take, f"Check the connection and HF_ENDPOINT, or give {option} a folder.", error)
    except RefusedError as error:
        with suppress(IncompleteError):
            return cached(model, revision, take)
        raise error from None


def cached(
    model: str, revision: str | None, take: Collect, advice: str = "", before: CapcliError | None = None
) -> ModelFiles:
    """The model of an earlier download. Raises IncompleteError, which ends with `advice`, where a file of it is missing."""
    from huggingface_hub import constants, try_to_load_from_cache

    path = try_to_load_from_cache(model, CONFIG, revision=revision)
    try:
        if not isinstance(path, str):
            shown = model if revision is None else f"{model} at revision {revision}"
            raise IncompleteError(f"{shown} is not in the cache ({constants.HF_HUB_CACHE}).")
        folder = os.path.dirname(path)
        return take(model, list_model(folder, f"The cached copy of {model}"), os.path.basename(folder))
    except IncompleteError as missing:
        raise IncompleteError(" ".join(filter(None, (str(before or ""), str(missing), advice)))) from before


def download(model: str, revision: str | None, quiet: bool, take: Collect) -> ModelFiles:
    """Downloads the files that the cache lacks. Raises the errors of ERRORS, and those of `take`."""
    from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    with explained(model, revision):  # without a timeout the client waits forever
        wanted, timeout = revision or constants.DEFAULT_REVISION, constants.HF_HUB_ETAG_TIMEOUT
        info = HfApi(library_name="capcli", library_version=__version__).model_info(
            model, revision=wanted, timeout=timeout
        )
    names = frozenset(file.rfilename for file in info.siblings or () if "/" not in file.rfilename)

    def fetch(name: str, commit: str | None = info.sha) -> str:
        with explained(model, revision):
            return hf_hub_download(model, name, revision=commit, library_name="capcli", library_version=__version__)

    with ExitStack() as stack:
        if quiet and not are_progress_bars_disabled():
            disable_progress_bars()
            stack.callback(enable_progress_bars)
        files = take(model, ModelListing(f"{model} on the hub", names, fetch), info.sha)
        # Bind the revision's name to this commit in the cache: last, so that an interrupted download does not hide an
        # earlier complete one. A failure here only matters to a later run without network.
        if try_to_load_from_cache(model, CONFIG, revision=revision) != os.path.join(files.folder, CONFIG):
            with suppress(CapcliError):
                fetch(CONFIG, revision)
    return files


@contextmanager
def explained(model: str, revision: str | None) -> Iterator[None]:
    """A context for a request: every exception becomes an error of ERRORS."""
    from huggingface_hub import constants

    try:
        yield
    except Exception as error:
        raised: BaseException = error
        if type(error).__name__ == "LocalEntryNotFoundError":  # it only reports that the cache lacks the file
            raised = error.__cause__ or error
        kind, text = ERRORS[next(key for key in error_keys(raised) if key in ERRORS)]
        facts: dict[str, object] = {"model": model, "revision": revision, "hub": constants.ENDPOINT}
        facts["cache"] = constants.HF_HUB_CACHE
        facts["path"] = getattr(raised, "filename", None) or constants.HF_HUB_CACHE
        facts["status"] = getattr(getattr(raised, "response", None), "status_code", None)
        line = str(raised).strip().partition("\n")[0].rstrip(".")
        facts["reason"] = getattr(raised, "strerror", None) or line or type(raised).__name__
        raise kind(text.format_map(facts)) from error


def error_keys(error: BaseException) -> Iterator[int | str]:
    """The keys of ERRORS that fit an exception, the most specific first."""
    code = error.errno if isinstance(error, OSError) else None
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "No space left on device" in str(error):
        yield "no room"  # the transfer library gives a text and no number
    for base in type(error).__mro__:
        if base.__name__ == "HfHubHTTPError":
            yield getattr(error, "response").status_code  # noqa: B009  (it has no other type here)
        if base is OSError and code is not None and not isinstance(error, ConnectionError | TimeoutError):
            yield "disk"
        yield base.__name__
