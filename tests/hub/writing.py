"""Writing to the tests' Hub: making repositories, uploading, committing.

What is large is uploaded as git LFS has it, in one request or in parts. (The Hub's newer storage,
Xet, has no place here: a client is told by `HF_HUB_DISABLE_XET` not to use it.)
"""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import yaml

from tests.hub.server import ROUTES, RefusedError, Reply, as_json, refused
from tests.hub.store import etag_of, is_large, sha256_of

if TYPE_CHECKING:
    from tests.hub.server import Handler, Hub
    from tests.hub.store import Repo

LICENSES = ("apache-2.0", "mit", "llama3.1", "gemma", "other")
"""Some licences that the Hub knows; a card with another one is rejected."""

ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


def let_write(hub: Hub, token: str, *namespaces: str) -> None:
    """Let the user of a token read and write in some namespaces."""
    hub.tokens.setdefault(token, set())
    hub.state.setdefault("writers", {})[token] = set(namespaces)


def split_uploads(hub: Hub, part_size: int) -> None:
    """Ask for large files in parts of this many bytes."""
    hub.state["part_size"] = part_size


def _stored(hub: Hub) -> dict[str, bytes]:
    """What was uploaded, by its SHA-256."""
    found: dict[str, bytes] = hub.state.setdefault("stored", {})
    return found


def _parts(hub: Hub) -> dict[tuple[str, int], bytes]:
    found: dict[tuple[str, int], bytes] = hub.state.setdefault("parts", {})
    return found


def _require_writer(handler: Handler, namespace: str) -> str:
    """The user of a request, who must be allowed to write."""
    token = handler.token
    if token is None or token not in handler.hub.tokens:
        raise RefusedError(refused(401, "", "Invalid username or password."))
    if namespace not in handler.hub.state.get("writers", {}).get(token, ()):
        said = f'You don\'t have the rights to create a model under the namespace "{namespace}"'
        raise RefusedError(refused(403, "", said))
    return token


def _writable(handler: Handler, repo: str) -> Repo:
    found = handler.repo(repo)
    _require_writer(handler, repo.split("/")[0])
    return found


def _create(handler: Handler) -> Reply:
    asked = json.loads(handler.data)
    repo_id = f"{asked['organization']}/{asked['name']}"
    hub = handler.hub
    token = _require_writer(handler, asked["organization"])
    if repo_id in hub.repos:
        said = "You already created this model repo"
        known = json.dumps({"error": said, "url": f"{hub.url}/{repo_id}"}).encode()
        raise RefusedError(replace(refused(409, "", said), body=known))
    repo = hub.add(repo_id, private=asked.get("visibility") == "private")
    repo.commit({".gitattributes": ATTRIBUTES}, message="initial commit")
    hub.tokens[token].add(repo_id)
    return as_json({"url": f"{hub.url}/{repo_id}", "name": repo_id, "id": repo_id})


def _check_card(handler: Handler) -> Reply:
    """Whether the Hub accepts a card: valid YAML, a known licence, complete results."""
    text = json.loads(handler.data)["content"]
    match = re.match(r"---\n(.*?\n)---\n", text, re.DOTALL)
    if match is None:
        return as_json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}]})
    try:
        card = yaml.safe_load(match[1])
        errors = [] if isinstance(card, dict) else ["metadata is no mapping"]
    except yaml.YAMLError as exc:
        card, errors = {}, [f"bad YAML: {exc}"]
    if not errors and card.get("license", "mit") not in LICENSES:
        errors.append('"license" must be one of [apache-2.0, mit, …]')
    for index in () if errors else card.get("model-index", ()):
        for result in index["results"]:
            whole = {"type", "name"} <= result["dataset"].keys() and "type" in result["task"]
            if not whole or not all({"type", "value"} <= m.keys() for m in result["metrics"]):
                errors.append('"model-index" has a result that is not whole')
    reply = as_json({"errors": [{"message": error} for error in errors], "warnings": []})
    reply.status = 400 if errors else 200
    return reply


def _before_upload(handler: Handler, repo: str, revision: str) -> Reply:
    """How each file is to be uploaded, and what the repository has of that name."""
    folder = _writable(handler, repo).at(revision)
    ignored = handler.hub.state.get("ignored", "$.")
    return as_json(
        {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if is_large(file["path"]) else "regular",
                    "shouldIgnore": re.search(ignored, file["path"]) is not None,
                    "oid": etag_of(there) if (there := folder / file["path"]).is_file() else None,
                }
                for file in json.loads(handler.data)["files"]
            ]
        }
    )


def _batch(handler: Handler, repo: str) -> Reply:
    """The places to upload files that are not stored yet."""
    _writable(handler, repo)
    hub = handler.hub
    objects = []
    for wanted in json.loads(handler.data)["objects"]:
        entry: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in _stored(hub):
            entry["actions"] = {"upload": _upload_action(hub, repo, entry)}
        objects.append(entry)
    return as_json({"transfer": "basic", "objects": objects})


def _upload_action(hub: Hub, repo: str, entry: dict[str, Any]) -> dict[str, Any]:
    place = f"{hub.cdn}/upload/{repo}/{entry['oid']}"
    size = hub.state.get("part_size")
    if size is None:
        return {"href": place}
    count = -(-entry["size"] // size)
    links = {str(number): f"{place}/{number}" for number in range(1, count + 1)}
    return {
        "href": f"{hub.url}/upload/{repo}/{entry['oid']}",
        "header": {"chunk_size": size} | links,
    }


def _take(handler: Handler, repo: str, oid: str) -> Reply:
    del repo
    return _store(handler.hub, oid, handler.data)


def _take_part(handler: Handler, repo: str, oid: str, number: str) -> Reply:
    del repo
    _parts(handler.hub)[oid, int(number)] = handler.data
    return Reply(200, {"ETag": f'"{sha256_of(handler.data)}"'})


def _join(handler: Handler, repo: str, oid: str) -> Reply:
    del repo
    numbers = [part["partNumber"] for part in json.loads(handler.data)["parts"]]
    return _store(handler.hub, oid, b"".join(_parts(handler.hub)[oid, n] for n in numbers))


def _store(hub: Hub, oid: str, data: bytes) -> Reply:
    if sha256_of(data) != oid:
        raise RefusedError(refused(400, "", "what came is not what was announced"))
    _stored(hub)[oid] = data
    return Reply()


def _commit(handler: Handler, repo: str, revision: str) -> Reply:
    """Make a commit of files that come with it and of those that were uploaded before."""
    found = _writable(handler, repo)
    stored = _stored(handler.hub)
    changes: dict[str, bytes | None] = {}
    summary = ""
    for line in handler.data.splitlines():
        kind, value = (item := json.loads(line))["key"], item["value"]
        if kind == "header":
            summary = value["summary"]
            if value.get("parentCommit", found.refs[revision]) != found.refs[revision]:
                said = "A commit has happened since. Please refresh and try again."
                raise RefusedError(refused(412, "", said))
        elif kind == "file":
            changes[value["path"]] = base64.b64decode(value["content"])
        elif kind == "lfsFile":
            if value["oid"] not in stored:
                raise RefusedError(refused(400, "", f"no upload of {value['path']}"))
            changes[value["path"]] = stored[value["oid"]]
        else:
            assert kind == "deletedFile", kind
            changes[value["path"]] = None
    commit = found.commit(changes, branch=revision, message=summary)
    handler.hub.state.setdefault("messages", []).append(summary)
    url = f"{handler.hub.url}/{repo}/commit/{commit}"
    return as_json({"success": True, "commitUrl": url, "commitOid": commit, "hookOutput": ""})


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+?)"
_AT = r"(?P<revision>[^/]+)"
_OID = r"(?P<oid>[0-9a-f]{64})"

ROUTES += [
    ("POST", r"/api/repos/create", _create),
    ("POST", r"/api/validate-yaml", _check_card),
    ("POST", rf"/api/models/{_REPO}/preupload/{_AT}", _before_upload),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _batch),
    ("PUT", rf"/upload/{_REPO}/{_OID}", _take),
    ("PUT", rf"/upload/{_REPO}/{_OID}/(?P<number>\d+)", _take_part),
    ("POST", rf"/upload/{_REPO}/{_OID}", _join),
    ("POST", rf"/api/models/{_REPO}/commit/{_AT}", _commit),
]
