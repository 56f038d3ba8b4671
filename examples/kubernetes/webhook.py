"""An admission webhook: pods with the label `samepage: merge` join the daemon of their node.

Usage: python webhook.py CERTIFICATE KEY [PORT]

It adds what docs/containers.md says a container needs: the folder with the agent and the socket, and the variables.
The API server asks it for each new pod that has the label. Only the standard library is used.
"""

from __future__ import annotations

import base64
import json
import ssl
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FOLDER = "/run/samepage"
VOLUME = "samepage"
AGENT = f"{FOLDER}/libsamepage.so"
REQUEST_MAX = 8 << 20  # a pod has at most 1.5 MiB, and is sent twice

Json = dict[str, Any]


def patched(pod: Json) -> list[Json]:
    """The JSON patch that has the containers of a pod join; empty if they do already, or cannot."""
    spec = pod["spec"]
    if any(volume["name"] == VOLUME for volume in spec.get("volumes", [])):
        return []
    # DirectoryOrCreate: on a node without a daemon the pod starts all the same. The loader says that it found no agent.
    volume = {"name": VOLUME, "hostPath": {"path": FOLDER, "type": "DirectoryOrCreate"}}
    changes = [
        change
        for number, container in enumerate(spec["containers"])
        for change in _container(f"/spec/containers/{number}", container, _filters(spec, container))
    ]
    return [_append("/spec", spec, "volumes", [volume]), *changes] if changes else []


def _container(path: str, container: Json, filters: int) -> list[Json]:
    set_here = {variable["name"]: variable for variable in container.get("env", [])}
    before = set_here.pop("LD_PRELOAD", {"value": ""})
    if "value" not in before:
        return []  # it comes from a secret, say, and is not known here
    wanted = {"LD_PRELOAD": f"{AGENT}:{before['value']}".rstrip(":"), "SAMEPAGE_SOCKET": f"{FOLDER}/socket"}
    wanted |= {"SAMEPAGE_MEMORY": "all"} | ({"SAMEPAGE_SECCOMP": str(filters)} if filters else {})
    added = [{"name": name, "value": value} for name, value in wanted.items() if name not in set_here]
    others = [variable for variable in container.get("env", []) if variable["name"] != "LD_PRELOAD"]
    mount = {"name": VOLUME, "mountPath": FOLDER, "readOnly": True}
    return [
        {"op": "add", "path": f"{path}/env", "value": others + added},
        _append(path, container, "volumeMounts", [mount]),
    ]


def _filters(spec: Json, container: Json) -> int:
    """How many seccomp filters are known to end no process for a call of the agent's: the runtime's default is one."""
    for context in (container.get("securityContext", {}), spec.get("securityContext", {})):
        if "seccompProfile" in context:
            return int(context["seccompProfile"]["type"] == "RuntimeDefault")
    return 0


def _append(path: str, owner: Json, name: str, items: list[Json]) -> Json:
    return {"op": "add", "path": f"{path}/{name}", "value": [*owner.get(name, []), *items]}


def answer(review: Json) -> Json:
    """The AdmissionReview that answers one. The pod is always allowed."""
    request = review["request"]
    response: Json = {"uid": request["uid"], "allowed": True}
    if request["kind"]["kind"] == "Pod" and (patch := patched(request["object"])):
        response |= {"patchType": "JSONPatch", "patch": base64.b64encode(json.dumps(patch).encode()).decode()}
    return {"apiVersion": review["apiVersion"], "kind": review["kind"], "response": response}


class Handler(BaseHTTPRequestHandler):
    """Answers POST with an AdmissionReview, and GET for the probe."""

    timeout = 10

    def do_GET(self) -> None:
        self._send(200, b"")

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        if not 0 < length <= REQUEST_MAX:
            self._send(413, b"")
            return
        try:
            self._send(200, json.dumps(answer(json.loads(self.rfile.read(length)))).encode())
        except (ValueError, KeyError, TypeError, AttributeError):
            self._send(400, b"")

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Server(ThreadingHTTPServer):
    """With the handshake in the thread of the connection, so that a silent client holds up nobody."""

    def __init__(self, address: tuple[str, int], certificate: str, key: str) -> None:
        super().__init__(address, Handler)
        self._tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._tls.load_cert_chain(certificate, key)

    def finish_request(self, request: Any, client_address: Any) -> None:
        request.settimeout(Handler.timeout)
        with self._tls.wrap_socket(request, server_side=True) as connection:
            super().finish_request(connection, client_address)


if __name__ == "__main__":
    Server(("", int(sys.argv[3]) if len(sys.argv) > 3 else 8443), sys.argv[1], sys.argv[2]).serve_forever()
