"""Failures of requests to the Hub: which to retry, and one-line errors for the others."""

from __future__ import annotations

import contextlib
import errno
import time
from difflib import get_close_matches
from json import JSONDecodeError
from typing import TYPE_CHECKING, TypeVar

import httpx2
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)

from diffxfer.errors import DiskSpaceError, HubError, first_line

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffxfer.checkpoints.hub.repo_ids import HubId

_T = TypeVar("_T")

PATIENCE_S = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0)
"""Seconds to wait before each retry, once the Hub has answered."""

AT_FIRST_S = PATIENCE_S[:3]
"""The same for the first request, so that a machine without a network fails soon."""

_MAX_WAIT_S = 300
_FALSE_S = PATIENCE_S[1]
"""After this wait, a false answer is final: each retry may repeat a download."""
_SET_WRONG = (httpx2.ProxyError, httpx2.UnsupportedProtocol)
_BUSY = (408, 429, 500, 502, 503, 504)
NO_HUB = (
    "open it in a browser, as the network may need a login, or correct HF_ENDPOINT and your proxy"
)
"""The remedy if a web page comes instead of an answer."""

_ONCE_MORE = "run the same command again: files already downloaded stay in the Hub's cache"


class FalseAnswerError(Exception):
    """An answer that is not what was requested, whatever its status.

    Args:
        found: what was found, as the rest of a sentence about the Hub or a proxy.
    """


def persistently(call: Callable[[], _T], model: HubId, waits: tuple[float, ...] = PATIENCE_S) -> _T:
    """Make a request to the Hub, with retries where they may help.

    Args:
        call: makes the request.
        model: the model that it is about.
        waits: seconds to wait before each retry.

    Raises:
        HubError: if it fails.
    """
    return with_retries(call, waits, lambda exc: explain(exc, model))


def with_retries(
    call: Callable[[], _T],
    waits: tuple[float, ...],
    explained: Callable[[Exception], BaseException],
    root: Callable[[Exception], BaseException] = lambda exc: exc,
) -> _T:
    """Make a request, with retries where they may help.

    Args:
        call: makes the request.
        waits: seconds to wait before each retry.
        explained: the error to raise for a failure, or the failure itself.
        root: the cause of a failure, which decides whether a retry may help.

    Raises:
        Exception: what `explained` returns for the last failure.
    """
    for wait in (*waits, None):
        try:
            return call()
        except Exception as exc:
            pause = None if wait is None else pause_before_retry(root(exc), wait)
            if pause is None:
                told = explained(exc)
                if told is exc:
                    raise
                raise told from exc
        time.sleep(pause)
    raise AssertionError("the last failure is raised")


def pause_before_retry(exc: BaseException, wait_s: float) -> float | None:
    """Seconds to wait before a retry, None if a retry is useless.

    Args:
        exc: the failure.
        wait_s: seconds to wait if the Hub does not state a time.
    """
    if isinstance(exc, RevisionResolutionError) and isinstance(exc.__cause__, Exception):
        exc = exc.__cause__
    if isinstance(exc, HfHubHTTPError):
        if exc.response.status_code not in _BUSY:
            return None
        asked = exc.response.headers.get("Retry-After", "")
        return None if asked.isdigit() and int(asked) > _MAX_WAIT_S else _seconds(asked, wait_s)
    lost = isinstance(exc, httpx2.TransportError) and not isinstance(exc, _SET_WRONG)
    if isinstance(exc, FalseAnswerError):
        return wait_s if wait_s <= _FALSE_S else None
    # huggingface_hub raises this for a file that is too short.
    short = type(exc) is OSError and exc.errno is None
    return wait_s if lost or short else None


def _seconds(asked: str, otherwise: float) -> float:
    return float(asked) if asked.isdigit() else otherwise


def explain(exc: Exception, model: HubId) -> Exception:
    """Translate a failure into a one-line error with a remedy.

    Args:
        exc: the exception of huggingface_hub or its HTTP client.
        model: the model that was requested.

    Returns:
        A `HubError`, a `DiskSpaceError` for a full disk, or `exc` itself if it is unknown.
    """
    resolving = isinstance(exc, RevisionResolutionError)
    cause = exc.__cause__ if resolving and exc.__cause__ is not None else exc
    for kind, tell in _TELL:
        if isinstance(cause, kind):
            return tell(cause, model)
    if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = f"free disk space, or set HF_HOME to a folder on a larger disk, and {_ONCE_MORE}"
        return DiskSpaceError(constants.HF_HUB_CACHE, "the disk is full", remedy)
    if type(cause) is OSError and cause.errno is None:
        return _error(model, "connection", "was not downloaded completely", _ONCE_MORE)
    return exc


def _error(model: HubId, reason: str, problem: str, remedy: str) -> HubError:
    return HubError(model.repo, model.revision, reason, problem, remedy)


def page_of(repo: str) -> str:
    """The URL of the model's page."""
    return f"{constants.ENDPOINT}/{repo}"


def _gated(exc: Exception, model: HubId) -> HubError:
    del exc
    page = page_of(model.repo)
    if get_token() is None:
        remedy = f"log in at {page}, accept the licence there, then run: hf auth login"
    else:
        remedy = (
            f"open {page} with the account of your token, accept the licence, and wait for "
            "approval if it is required; a fine-grained token must allow gated repositories"
        )
    return _error(model, "gated", "is gated: its licence must be accepted first", remedy)


def _missing(exc: Exception, model: HubId) -> HubError:
    del exc
    near = _near_models(model.repo)
    hint = f"did you mean {' or '.join(near)}? Or," if near else "check the spelling;"
    if get_token() is None:
        problem = f"is neither a local folder nor a public model at {constants.ENDPOINT}"
        remedy = f"{hint} if it is private, run: hf auth login"
    else:
        problem = f"is neither a local folder nor a model at {constants.ENDPOINT} that you may read"
        remedy = f"{hint} if it is private, log in with a token that may read it: hf auth login"
    return _error(model, "missing", problem, remedy)


def _near_models(repo: str) -> list[str]:
    """Public models with similar ids; only a hint, so failures are ignored."""
    org, name = repo.split("/")
    found: list[str] = []
    with contextlib.suppress(httpx2.HTTPError, HfHubHTTPError, ValueError):
        found += [model.id for model in HfApi().list_models(author=org, limit=200)]
        found += [model.id for model in HfApi().list_models(search=name, limit=20)]
    others = [model for model in dict.fromkeys(found) if model != repo]
    return get_close_matches(repo, others, n=2, cutoff=0.75)


def _no_revision(exc: Exception, model: HubId) -> HubError:
    del exc
    known: list[str] = []
    with contextlib.suppress(httpx2.HTTPError, HfHubHTTPError, ValueError):
        refs = HfApi().list_repo_refs(model.repo)
        known = [ref.name for ref in (*refs.branches, *refs.tags)]
    near = get_close_matches(model.revision or "", known, n=1)
    remedy = f"use one of {', '.join(known[:8])}" if known else f"see {page_of(model.repo)}/commits"
    remedy = f"did you mean {model.repo}@{near[0]}?" if near else remedy
    return _error(model, "revision", f"has no revision {model.revision!r}", remedy)


def _disabled(exc: Exception, model: HubId) -> HubError:
    del exc
    problem = "was disabled by the Hub"
    return _error(model, "disabled", problem, f"see {page_of(model.repo)}")


def _offline(exc: Exception, model: HubId) -> HubError:
    del exc
    return not_cached(model)


def not_cached(model: HubId, name: str = "") -> HubError:
    """The error for a file that is not in the cache while the Hub may not be asked.

    Args:
        model: the model.
        name: the missing file, if known.
    """
    lacks = f"does not contain its {name}" if name else "does not contain it"
    where = f"the cache {constants.HF_HUB_CACHE} {lacks}"
    problem = f"cannot be fetched: HF_HUB_OFFLINE is set, and {where}"
    return _error(model, "offline", problem, "unset HF_HUB_OFFLINE once to download it")


def _http(exc: Exception, model: HubId) -> HubError:
    assert isinstance(exc, HfHubHTTPError)
    status = exc.response.status_code
    if status == 401:
        problem = "cannot be fetched: the Hub rejects your token"
        remedy = "correct or unset HF_TOKEN, or run: hf auth login"
        return _error(model, "token", problem, remedy)
    if status == 429:
        asked = exc.response.headers.get("Retry-After", "")
        wait = f"wait {asked} s" if asked.isdigit() and int(asked) else "wait a few minutes"
        problem = "cannot be fetched now: the Hub got too many requests from this address"
        more = "" if get_token() else ", or log in for a higher limit (hf auth login)"
        return _error(model, "rate limit", problem, f"{wait}{more}, and {_ONCE_MORE}")
    if status >= 500:
        problem = f"cannot be fetched now: server error at {constants.ENDPOINT} (status {status})"
        return _error(model, "server", problem, f"wait a while, and {_ONCE_MORE}")
    said = exc.server_message or ""
    said = f": {said.splitlines()[0]}" if said else ""
    problem = f"cannot be fetched: {constants.ENDPOINT} refuses the request (status {status}{said})"
    return _error(model, "refused", problem, f"see {page_of(model.repo)}")


def _connection(exc: Exception, model: HubId) -> HubError:
    problem = f"cannot be fetched: no connection to {constants.ENDPOINT} ({first_line(exc)})"
    if isinstance(exc, _SET_WRONG):
        remedy = (
            "correct HF_ENDPOINT or your proxy (HTTPS_PROXY): each must be a URL such as https://…"
        )
    else:
        remedy = f"check the network, and {_ONCE_MORE}"
    return _error(model, "connection", problem, remedy)


def _false(exc: Exception, model: HubId) -> HubError:
    problem = f"cannot be fetched: {constants.ENDPOINT}, or a proxy before it, {exc}"
    remedy = "if the error persists, correct HF_ENDPOINT and your proxy, or tell the server's owner"
    return _error(model, "content", problem, remedy)


def _no_json(exc: Exception, model: HubId) -> HubError:
    del exc
    problem = f"cannot be fetched: the server at {constants.ENDPOINT} is not the Hub"
    return _error(model, "content", problem, NO_HUB)


def _no_id(exc: Exception, model: HubId) -> HubError:
    problem = f"is not the id of a model on the Hub ({first_line(exc)})"
    return _error(model, "name", problem, "give a folder, or org/name[@revision]")


_TELL: tuple[tuple[type[Exception], Callable[[Exception, HubId], HubError]], ...] = (
    (GatedRepoError, _gated),
    (RepositoryNotFoundError, _missing),
    (RevisionNotFoundError, _no_revision),
    (DisabledRepoError, _disabled),
    (OfflineModeIsEnabled, _offline),
    (LocalEntryNotFoundError, _offline),
    (RevisionResolutionError, _offline),
    (HfHubHTTPError, _http),
    (httpx2.TransportError, _connection),
    (HFValidationError, _no_id),
    (FalseAnswerError, _false),
    (JSONDecodeError, _no_json),
)
"""The order matters: the first are special cases of the later ones."""
