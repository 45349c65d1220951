"""Failures of writes to the Hub, as one-line errors with a remedy."""

from __future__ import annotations

from json import JSONDecodeError

import httpx2
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from diffxfer.checkpoints.hub.failures import NO_HUB, page_of
from diffxfer.errors import HubError, first_line

_ONCE_MORE = "run the same command again: files already uploaded are skipped"
_LOGIN = "run hf auth login with a token that may write, or set HF_TOKEN"


def root_of(exc: BaseException) -> BaseException:
    """The cause of a failure: huggingface_hub wraps exceptions of its threads.

    Args:
        exc: the exception that it raised.
    """
    kinds = (HfHubHTTPError, httpx2.TransportError)
    # A ValueError has the Hub's message about a card; its cause does not.
    found: BaseException | None = None if type(exc) is ValueError else exc
    while found is not None and not isinstance(found, kinds):
        found = found.__cause__
    return exc if found is None else found


def no_token(repo: str) -> HubError:
    """The error if nobody is logged in.

    Args:
        repo: the repository to write to.
    """
    return _error(repo, "token", "cannot be written to: no token is set", _LOGIN)


def refuse_offline(repo: str) -> None:
    """Refuse to write in offline mode.

    Args:
        repo: the repository to write to.

    Raises:
        HubError: if `HF_HUB_OFFLINE` is set.
    """
    if constants.is_offline_mode():
        raise _offline(repo)


def explain_refusal(exc: BaseException, repo: str) -> BaseException:
    """Translate a failure to write into a one-line error.

    Args:
        exc: the exception from `root_of`.
        repo: the repository to write to.

    Returns:
        A `HubError`, or `exc` itself if it is unknown.
    """
    if isinstance(exc, HfHubHTTPError):
        return _http(exc, repo)
    if isinstance(exc, OfflineModeIsEnabled):
        return _offline(repo)
    if isinstance(exc, httpx2.TransportError):
        problem = f"cannot be written to: no connection to {constants.ENDPOINT} ({first_line(exc)})"
        return _error(repo, "connection", problem, f"check the network, and {_ONCE_MORE}")
    if isinstance(exc, HFValidationError):
        problem = f"is not the id of a model on the Hub ({first_line(exc)})"
        return _error(repo, "name", problem, "give another one, such as org/name")
    if type(exc) is ValueError:  # huggingface_hub's, with the Hub's message about a card or a file
        said = " ".join(str(exc).split())
        remedy = "if the licence is invalid, give another one with --license"
        return _error(repo, "refused", f"rejects the upload: {said}", remedy)
    if isinstance(exc, JSONDecodeError):
        problem = f"cannot be written to: the server at {constants.ENDPOINT} is not the Hub"
        return _error(repo, "refused", problem, NO_HUB)
    if type(exc).__module__.startswith("hf_xet") or type(exc) is RuntimeError:
        return _error(repo, "connection", f"was not written: {first_line(exc)}", _ONCE_MORE)
    return exc


def _http(exc: HfHubHTTPError, repo: str) -> HubError:
    status = exc.response.status_code
    said = next(iter((exc.server_message or "").splitlines()), "")
    said = f" ({said})" if said else ""
    if status == 401:
        problem = f"cannot be written to: the Hub rejects your token{said}"
        return _error(repo, "token", problem, _LOGIN)
    if status in (403, 404):
        problem = f"cannot be written to with your token{said}"
        remedy = f"push to a namespace of your own (see hf auth whoami), or {_LOGIN}"
        return _error(repo, "refused", problem, remedy)
    if status == 412:
        problem = "was changed by someone else during the upload"
        return _error(repo, "changed", problem, f"check it, and {_ONCE_MORE}")
    if status == 429:
        problem = "cannot be written to now: the Hub got too many requests from this address"
        return _error(repo, "rate limit", problem, f"wait a few minutes, and {_ONCE_MORE}")
    if status >= 500:
        problem = (
            f"cannot be written to now: server error at {constants.ENDPOINT} (status {status})"
        )
        return _error(repo, "server", problem, f"wait a while, and {_ONCE_MORE}")
    problem = f"rejects the upload: {constants.ENDPOINT} answers with status {status}{said}"
    return _error(repo, "refused", problem, f"see {page_of(repo)}")


def _offline(repo: str) -> HubError:
    problem = "cannot be written to: HF_HUB_OFFLINE is set"
    return _error(repo, "offline", problem, "unset it to push")


def _error(repo: str, reason: str, problem: str, remedy: str) -> HubError:
    return HubError(repo, None, reason, problem, remedy)
