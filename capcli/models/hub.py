"""Where a captioner's files come from: a folder, the cache of earlier downloads, or a hub."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import sys
from collections.abc import Callable, Iterator

from capcli import __version__
from capcli.errors import CapcliError, UsageError
from capcli.models.model_files import CONFIG, IncompleteError, ModelFiles, ModelListing, collect_files, list_model

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
COMMIT = re.compile("[0-9a-f]{40}")
Gather = Callable[[str, ModelListing, str | None], ModelFiles]  # which files are taken, and what is refused


class _RefusedError(CapcliError):
    """The hub gave no files; those of an earlier download may still serve."""


class _UnreachableError(_RefusedError):
    """The hub could not be asked at all."""


def find_model(
    model: str,
    revision: str | None = None,
    *,
    quiet: bool = False,
    take: Gather = collect_files,
    option: str = "--model",
) -> ModelFiles:
    """Give the files of the captioner that `model` names: a folder, or a name on the hub (downloaded into its cache).

    `revision` is a branch, tag or commit of a hub model. Progress is shown on a terminal unless `quiet`. Whatever keeps
    the hub from answering is no error when the cache holds the model whole. `take` gathers the files, another than `gather`
    those of a part of a captioner, and `option` is what the user calls it. Raise UsageError when `model` or `revision`
    cannot be right, CapcliError when the files cannot be had or are not those of a supported captioner.
    """
    folder = os.path.expanduser(model)
    if os.path.isdir(folder):
        if revision is not None:
            raise UsageError(f"--revision is for models on the hub, and {model} is a folder: leave it out.")
        return take(model, list_model(folder), None)
    _refuse_malformed(model, option)
    return _from_hub(model, revision, quiet, take, option)


def _refuse_malformed(model: str, option: str) -> None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if os.path.isfile(os.path.expanduser(model)):
        raise UsageError(f"{model} is a file: {option} takes the folder that holds {CONFIG}, or a name on the hub.")
    if model.startswith(("/", ".", "~")) or model.endswith("/") or "\\" in model:
        raise UsageError(f"No such folder: {model}")
    try:
        try_to_load_from_cache(model, CONFIG)  # asked for its check of the name: it is the hub's own
    except HFValidationError as error:
        raise UsageError(
            f"No such folder: {model!r}, and it cannot be a name on the hub: those are 'owner/name', of letters,"
            " digits, '-', '_' and '.'."
        ) from error


def _from_hub(model: str, revision: str | None, quiet: bool, take: Gather, option: str) -> ModelFiles:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        try:
            return _cached(model, revision, take)
        except IncompleteError as lack:
            raise CapcliError(
                f"{lack} HF_HUB_OFFLINE is set: unset it to download the model, or give {option} a folder."
            ) from lack
    if revision is not None and COMMIT.fullmatch(revision):
        with contextlib.suppress(IncompleteError):
            return _cached(model, revision, take)  # a commit never changes: there is nothing to ask the hub
    try:
        return _download(model, revision, quiet, take)
    except _RefusedError as refused:
        try:
            return _cached(model, revision, take)
        except IncompleteError as lack:
            if isinstance(refused, _UnreachableError):
                raise CapcliError(
                    f"{refused} {lack} Check the connection and HF_ENDPOINT, or give {option} a folder."
                ) from refused
            raise refused from lack


def _cached(model: str, revision: str | None, take: Gather) -> ModelFiles:
    """Give the model as an earlier download left it; raise IncompleteError when it did not leave it whole."""
    from huggingface_hub import constants, try_to_load_from_cache

    path = try_to_load_from_cache(model, CONFIG, revision=revision)
    if not isinstance(path, str):
        wanted = model if revision is None else f"{model} at revision {revision}"
        raise IncompleteError(f"{wanted} is not in the cache ({constants.HF_HUB_CACHE}).")
    folder = os.path.dirname(path)
    return take(model, list_model(folder, f"The cached copy of {model}"), os.path.basename(folder))


def _download(model: str, revision: str | None, quiet: bool, take: Gather) -> ModelFiles:
    """Fetch into the hub's cache what is not there yet.

    Raise _RefusedError when the hub does not give it, UsageError for an unknown revision, CapcliError when it cannot be
    stored or is no supported captioner.
    """
    from huggingface_hub import HfApi, constants, hf_hub_download

    api = HfApi(library_name="capcli", library_version=__version__)
    with _explained(model, revision):
        # The client waits for ever unless told.
        timeout = constants.HF_HUB_ETAG_TIMEOUT
        info = api.model_info(model, revision=revision or constants.DEFAULT_REVISION, timeout=timeout)
    commit = info.sha
    names = frozenset(file.rfilename for file in info.siblings or () if "/" not in file.rfilename)

    def fetch(name: str) -> str:
        with _explained(model, revision):
            return hf_hub_download(model, name, revision=commit, library_name="capcli", library_version=__version__)

    with _progress(shown=not quiet and sys.stderr.isatty()):
        files = take(model, ModelListing(f"{model} on the hub", names, fetch), commit)
        _bind(model, revision, files)
    return files


def _bind(model: str, revision: str | None, files: ModelFiles) -> None:
    """Let the cache find these files under the revision's name.

    Done last, so that a download that breaks off does not hide the whole one before it.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    if try_to_load_from_cache(model, CONFIG, revision=revision) != os.path.join(files.folder, CONFIG):
        # The files are there: what fails here costs a later run without network, not this one.
        with contextlib.suppress(CapcliError), _explained(model, revision):
            hf_hub_download(model, CONFIG, revision=revision)


@contextlib.contextmanager
def _progress(shown: bool) -> Iterator[None]:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextlib.contextmanager
def _explained(model: str, revision: str | None) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # its HTTP client, its transfer library and the disk each raise types of their own
        raise _explain(error, model, revision) from error


def _explain(error: Exception, model: str, revision: str | None) -> CapcliError:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # it only says that the cache did not have the file either
    hub = constants.ENDPOINT
    if isinstance(error, errors.GatedRepoError):
        return _RefusedError(
            f"{model} is gated: accept its terms at {hub}/{model}, then log in with `hf auth login` or set HF_TOKEN."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return _RefusedError(
            f"There is no folder {model} here, and no such model on the hub ({hub}): check the name."
            " If the model is private, log in with `hf auth login` or set HF_TOKEN."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return UsageError(f"{model} has no revision {revision}: give a branch, tag or commit of {hub}/{model}.")
    if isinstance(error, errors.HfHubHTTPError):
        return _explain_status(error.response.status_code, model, hub)
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError | TimeoutError):
        return _explain_disk(error, model, constants.HF_HUB_CACHE)
    if "No space left on device" in str(error):  # the transfer library has no errno
        return _explain_disk(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), model, constants.HF_HUB_CACHE)
    reason = "what answers there is no hub" if isinstance(error, json.JSONDecodeError) else _first_line(error)
    return _UnreachableError(f"The hub ({hub}) cannot be reached: {reason}.")


def _explain_status(status: int, model: str, hub: str) -> CapcliError:
    if status == 401:
        return _RefusedError(f"The hub ({hub}) refuses the token: log in with `hf auth login`, or mend HF_TOKEN.")
    if status == 403:
        return _RefusedError(f"The hub ({hub}) does not let you read {model}: use a token that may (HF_TOKEN).")
    if status == 429:
        return _RefusedError(f"The hub ({hub}) allows no more requests for now: wait, or log in with `hf auth login`.")
    return _UnreachableError(f"The hub ({hub}) cannot be reached: it answers with status {status}.")


def _explain_disk(error: OSError, model: str, cache: str) -> CapcliError:
    if error.errno in NO_ROOM:
        return CapcliError(
            f"No room for {model} in {cache} ({error.strerror}): free some space, or set HF_HOME to a larger disk."
        )
    return CapcliError(
        f"Cannot store {model} in {cache} ({error.strerror}: {error.filename or cache}):"
        " set HF_HOME to a folder that can be written."
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
