"""A thin client of the apiserver: JSON in and out, every call with a deadline, errors as a small tree.

The `kubernetes` library brings login and TLS; its generated models are left out: they drop fields they do not know.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

import aiohttp
from kubernetes.aio import config as kubernetes_config
from kubernetes.aio.client import ApiClient, Configuration

from rljob_api.errors import RljobError
from rljob_api.names import FIELD_MANAGER
from rljob_operator.shell.kinds import Kind

Object = dict[str, Any]

CALL_SECONDS = 20.0
WATCH_SECONDS = 300
"""The apiserver ends a watch after that long; then it goes on where it was."""
SILENCE_SECONDS = 90.0
"""Bookmarks come every minute: a watch that says nothing for longer is dead, whatever its connection says."""
PAGE = 500
OPENED = "OPENED"


class ApiError(RljobError):
    """The apiserver refused a call, or did not answer."""

    def __init__(self, code: int, reason: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        """HTTP status; 0 where there was no answer."""
        self.reason = reason
        self.retry_after = retry_after


class NotFound(ApiError):
    """404."""


class AlreadyExists(ApiError):
    """409 on a create."""


class Conflict(ApiError):
    """409 on anything else: it changed since it was read, or is another object."""


class Gone(ApiError):
    """410: the watch's resourceVersion is too old; list again."""


class Refused(ApiError):
    """400, 403, 413, 422: the same call will be refused again."""


class Unavailable(ApiError):
    """No answer, 429 or 5xx: try again later."""


@dataclass(frozen=True, slots=True)
class WatchEvent:
    """One line of a watch: ADDED, MODIFIED, DELETED or BOOKMARK; before the first line OPENED, without an object."""

    type: str
    object: Object


class Api:
    """Calls to one apiserver. `counted(verb, plural, code)` hears of each."""

    def __init__(self, client: ApiClient, counted: Callable[[str, str, int], None] = lambda *_: None) -> None:
        self._client = client
        self._counted = counted

    @classmethod
    async def connect(cls, counted: Callable[[str, str, int], None] = lambda *_: None) -> Api:
        """By the pod's service account, else by KUBECONFIG.

        Raises:
            RljobError: there is neither.
        """
        configuration = Configuration()
        try:
            kubernetes_config.load_incluster_config(configuration)
        except kubernetes_config.ConfigException:
            try:
                await kubernetes_config.load_kube_config(client_configuration=configuration)
            except (kubernetes_config.ConfigException, OSError) as error:
                raise RljobError(
                    f"no cluster: this is no pod with a service account, and KUBECONFIG is not usable: {error}"
                ) from error
        return cls(ApiClient(configuration), counted)

    async def close(self) -> None:
        await self._client.close()

    # -------------------------------------------------------------------------------------------------------- reading

    async def get(self, kind: Kind, namespace: str, name: str) -> Object:
        """
        Raises:
            NotFound, ApiError
        """
        return await self._call("get", kind, "GET", kind.path(namespace, name))

    async def list_all(
        self, kind: Kind, namespace: str | None, *, labels: str = "", fields: str = ""
    ) -> tuple[list[Object], str]:
        """(objects, resourceVersion of the list), read in pages."""
        found: list[Object] = []
        query = {"limit": str(PAGE)}
        if labels:
            query["labelSelector"] = labels
        if fields:
            query["fieldSelector"] = fields
        while True:
            page = await self._call("list", kind, "GET", kind.path(namespace), query)
            for item in page.get("items") or ():
                found.append({**item, "kind": kind.name, "apiVersion": kind.api_version})
            token = page["metadata"].get("continue")
            if not token:
                return found, page["metadata"]["resourceVersion"]
            query["continue"] = token

    async def watch(
        self, kind: Kind, namespace: str | None, resource_version: str, *, labels: str = ""
    ) -> AsyncIterator[WatchEvent]:
        """Events since that version, until the apiserver ends the watch.

        Raises:
            Gone: the version is too old.
            ApiError: it broke, or said nothing for too long.
        """
        query = {
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": resource_version,
            "timeoutSeconds": str(WATCH_SECONDS),
        }
        if labels:
            query["labelSelector"] = labels
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CALL_SECONDS, sock_read=SILENCE_SECONDS)
        path = kind.path(namespace)
        response = await self._request("GET", path, query, None, "application/json", timeout)
        self._counted("watch", kind.plural, response.status)
        try:
            if response.status != 200:
                raise _error(await _answer(response), response.status, "watch", kind)
            yield WatchEvent(OPENED, {})
            async for line in response.content:
                event = json.loads(line)
                if event["type"] == "ERROR":
                    status = event["object"]
                    raise _error(status, int(status.get("code") or 500), "watch", kind)
                yield WatchEvent(event["type"], event["object"])
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise Unavailable(
                0, "Unavailable", f"the watch of {kind.plural} broke: {error or type(error).__name__}"
            ) from error
        finally:
            response.close()

    # -------------------------------------------------------------------------------------------------------- writing

    async def create(self, kind: Kind, namespace: str, body: Mapping[str, Any]) -> Object:
        """
        Raises:
            AlreadyExists, Refused, ApiError
        """
        query = {"fieldManager": FIELD_MANAGER, "fieldValidation": "Strict"}
        return await self._call("create", kind, "POST", kind.path(namespace), query, body)

    async def merge(
        self, kind: Kind, namespace: str, name: str, patch: Mapping[str, Any], *, subresource: str | None = None
    ) -> Object:
        """A merge patch; uid and resourceVersion in it are preconditions.

        Raises:
            NotFound, Conflict, Refused, ApiError
        """
        # An older CRD drops fields of the status: who wrote them looks what is left, a refusal would stop all of it.
        validation = "Ignore" if subresource == "status" else "Strict"
        query = {"fieldManager": FIELD_MANAGER, "fieldValidation": validation}
        path = kind.path(namespace, name, subresource)
        return await self._call("patch", kind, "PATCH", path, query, patch, "application/merge-patch+json")

    async def patch(self, kind: Kind, namespace: str, name: str, operations: Sequence[Object]) -> Object:
        """A JSON patch.

        Raises:
            NotFound, Conflict, Refused, ApiError
        """
        query = {"fieldManager": FIELD_MANAGER, "fieldValidation": "Strict"}
        path = kind.path(namespace, name)
        return await self._call("patch", kind, "PATCH", path, query, list(operations), "application/json-patch+json")

    async def replace(self, kind: Kind, namespace: str, name: str, body: Mapping[str, Any]) -> Object:
        """PUT; the body's resourceVersion is the precondition.

        Raises:
            NotFound, Conflict, Refused, ApiError
        """
        return await self._call(
            "update", kind, "PUT", kind.path(namespace, name), {"fieldManager": FIELD_MANAGER}, body
        )

    async def delete(self, kind: Kind, namespace: str, name: str, uid: str) -> None:
        """Exactly the object of that uid; one that is gone is fine.

        Raises:
            Conflict: another object has the name now.
            ApiError
        """
        body = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": "Background",
            "preconditions": {"uid": uid},
        }
        try:
            await self._call("delete", kind, "DELETE", kind.path(namespace, name), None, body)
        except NotFound:
            return

    # ------------------------------------------------------------------------------------------------------ underneath

    async def _call(
        self,
        verb: str,
        kind: Kind,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        content_type: str = "application/json",
    ) -> Object:
        code = 0
        try:
            timeout = aiohttp.ClientTimeout(total=CALL_SECONDS)
            response = await self._request(method, path, query, body, content_type, timeout)
            code = response.status
            answer = await _answer(response)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            said = str(error) or type(error).__name__
            raise Unavailable(
                0, "Unavailable", f"{verb} {kind.plural}: the apiserver does not answer: {said}"
            ) from error
        finally:
            self._counted(verb, kind.plural, code)
        if code >= 300:
            wait = response.headers.get("Retry-After", "")
            raise _error(answer, code, verb, kind, float(wait) if wait.isdigit() else None)
        return answer

    async def _request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        body: Any,
        content_type: str,
        timeout: aiohttp.ClientTimeout,
    ) -> aiohttp.ClientResponse:
        configuration = self._client.configuration
        headers = {"Content-Type": content_type, "Accept": "application/json", "User-Agent": FIELD_MANAGER}
        token = await configuration.get_api_key_with_prefix("BearerToken", alias="authorization")
        if token:
            headers["Authorization"] = token
        url = f"{configuration.host}{path}" + (f"?{urlencode(query)}" if query else "")
        answer = await self._client.rest_client.request(
            method, url, headers=headers, body=body, _request_timeout=timeout
        )
        response: aiohttp.ClientResponse = answer.response
        return response


async def _answer(response: aiohttp.ClientResponse) -> Object:
    data = await response.read()
    try:
        found = json.loads(data)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"message": data[:500].decode(errors="replace")}


def _error(status: Object, code: int, verb: str, kind: Kind, retry_after: float | None = None) -> ApiError:
    reason = str(status.get("reason") or "")
    message = str(status.get("message") or f"{verb} {kind.plural}: HTTP {code}")
    if code == 403 and "cannot find RESTMapping" in message:
        # An admission plugin that has not heard of a new CRD yet; nobody has forbidden anything.
        return Unavailable(code, reason, message)
    if code == 403 and "because it is being terminated" in message:
        return Unavailable(code, reason, message)  # the namespace goes, and the RLJob with it
    match code:
        case 404:
            return NotFound(code, reason, message)
        case 409 if reason == "AlreadyExists":
            return AlreadyExists(code, reason, message)
        case 409:
            return Conflict(code, reason, message)
        case 410:
            return Gone(code, reason, message)
        case 400 | 403 | 405 | 413 | 415 | 422:
            return Refused(code, reason, message)
        case _:
            return Unavailable(code, reason, message, retry_after)
