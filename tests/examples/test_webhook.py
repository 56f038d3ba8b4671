"""The admission webhook in examples/kubernetes adds to a pod what docs/containers.md says a container needs."""

from __future__ import annotations

import base64
import copy
import http.client
import json
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
Json = dict[str, Any]

REVIEW: Json = {
    "apiVersion": "admission.k8s.io/v1",
    "kind": "AdmissionReview",
    "request": {
        "uid": "705ab4f5-6393-11e8-b7cc-42010a800002",
        "kind": {"group": "", "version": "v1", "kind": "Pod"},
        "resource": {"group": "", "version": "v1", "resource": "pods"},
        "requestKind": {"group": "", "version": "v1", "kind": "Pod"},
        "requestResource": {"group": "", "version": "v1", "resource": "pods"},
        "namespace": "web",
        "operation": "CREATE",
        "userInfo": {
            "username": "system:serviceaccount:kube-system:replicaset-controller",
            "groups": ["system:masters"],
        },
        "object": {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"generateName": "model-server-7d4b9c-", "namespace": "web", "labels": {"samepage": "merge"}},
            "spec": {
                "securityContext": {"seccompProfile": {"type": "RuntimeDefault"}},
                "containers": [
                    {
                        "name": "server",
                        "image": "model-server:1.0",
                        "env": [
                            {"name": "LD_PRELOAD", "value": "/usr/lib/libjemalloc.so.2"},
                            {"name": "N", "value": "4"},
                        ],
                        "volumeMounts": [
                            {"name": "kube-api-access", "mountPath": "/var/run/secrets", "readOnly": True}
                        ],
                    },
                    {"name": "sidecar", "image": "proxy:2.1"},
                ],
                "volumes": [{"name": "kube-api-access", "emptyDir": {}}],
            },
        },
        "oldObject": None,
        "dryRun": False,
        "options": {"kind": "CreateOptions", "apiVersion": "meta.k8s.io/v1"},
    },
}
"""As an API server sends it, less what a pod has by default."""


@pytest.fixture(scope="module")
def webhook() -> Any:
    spec = spec_from_file_location("webhook", ROOT / "examples" / "kubernetes" / "webhook.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def apply(pod: Json, response: Json) -> Json:
    """The pod with the patch of a response: additions to objects alone (RFC 6902)."""
    pod = copy.deepcopy(pod)
    for change in json.loads(base64.b64decode(response["patch"])):
        assert change["op"] == "add"
        at: Any = pod
        *way, last = change["path"].split("/")[1:]
        for step in way:
            at = at[int(step)] if isinstance(at, list) else at[step]
        at[last] = change["value"]
    return pod


def variables(container: Json) -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in container["env"]}


def mutated(webhook: Any, change: Any = None) -> Json:
    review = copy.deepcopy(REVIEW)
    if change:
        change(review["request"]["object"]["spec"])
    answer = webhook.answer(review)
    assert (answer["apiVersion"], answer["kind"]) == ("admission.k8s.io/v1", "AdmissionReview")
    response = answer["response"]
    assert (response["uid"], response["allowed"]) == (review["request"]["uid"], True)
    assert response.get("patchType", "JSONPatch") == "JSONPatch"
    return apply(review["request"]["object"], response) if "patch" in response else {}


def test_each_container_gets_what_it_needs_and_keeps_what_it_has(webhook: Any) -> None:
    spec = mutated(webhook)["spec"]
    server, sidecar = spec["containers"]
    needed = {"SAMEPAGE_SOCKET": "/run/samepage/socket", "SAMEPAGE_MEMORY": "all", "SAMEPAGE_SECCOMP": "1"}
    preload = "/run/samepage/libsamepage.so"
    assert variables(server) == needed | {"LD_PRELOAD": f"{preload}:/usr/lib/libjemalloc.so.2", "N": "4"}
    assert variables(sidecar) == needed | {"LD_PRELOAD": preload}
    mount = {"name": "samepage", "mountPath": "/run/samepage", "readOnly": True}
    assert [m["name"] for m in server["volumeMounts"]] == ["kube-api-access", "samepage"]
    assert sidecar["volumeMounts"] == [mount]
    assert [volume["name"] for volume in spec["volumes"]] == ["kube-api-access", "samepage"]


def test_it_adds_what_the_document_and_the_deployment_have(webhook: Any) -> None:
    yaml = pytest.importorskip("yaml")
    deployment = yaml.safe_load((ROOT / "examples" / "kubernetes" / "deployment.yaml").read_text())
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert variables(mutated(webhook)["spec"]["containers"][1]) == variables(container)
    document = (ROOT / "docs" / "containers.md").read_text()
    assert all(f"`{name}`" in document or f"--env {name}=" in document for name in variables(container))


def test_the_mutated_pod_is_what_the_schemas_say(webhook: Any) -> None:
    validator = pytest.importorskip("kubernetes_validate")
    validator.validate(mutated(webhook), validator.latest_version(), strict=True)


@pytest.mark.parametrize(
    ("profile", "said"),
    [({"type": "RuntimeDefault"}, "1"), ({"type": "Localhost", "localhostProfile": "p"}, None), (None, None)],
)
def test_only_the_runtimes_own_filter_is_vouched_for(webhook: Any, profile: Json | None, said: str | None) -> None:
    def change(spec: Json) -> None:
        spec["securityContext"] = {}
        spec["containers"][0]["securityContext"] = {"seccompProfile": profile} if profile else {}

    assert variables(mutated(webhook, change)["spec"]["containers"][0]).get("SAMEPAGE_SECCOMP") == said


def test_a_second_call_changes_nothing(webhook: Any) -> None:
    first = mutated(webhook)
    assert mutated(webhook, lambda spec: spec.update(first["spec"])) == {}


def test_a_container_whose_preload_is_not_known_is_left_alone(webhook: Any) -> None:
    secret = {"name": "LD_PRELOAD", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}

    def change(spec: Json) -> None:
        spec["containers"][0]["env"] = [secret]

    server, sidecar = mutated(webhook, change)["spec"]["containers"]
    assert server["env"] == [secret]
    assert "LD_PRELOAD" in variables(sidecar)


# ---- over TLS ---------------------------------------------------------------------------------------------


@pytest.fixture
def address(webhook: Any, tmp_path: Path) -> Iterator[tuple[str, int, Path]]:
    """Of a server; and the certificate that it shows."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl")
    certificate, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    server = webhook.Server(("127.0.0.1", 0), str(certificate), str(key))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield "localhost", server.server_address[1], certificate
    server.shutdown()
    server.server_close()
    thread.join()


def post(address: tuple[str, int, Path], body: bytes) -> tuple[int, bytes]:
    host, port, certificate = address
    context = ssl.create_default_context(cafile=certificate)
    connection = http.client.HTTPSConnection(host, port, timeout=20, context=context)
    connection.request("POST", "/?timeout=2s", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_an_api_server_is_answered_while_another_client_says_nothing(address: tuple[str, int, Path]) -> None:
    with socket.create_connection(address[:2]):
        status, body = post(address, json.dumps(REVIEW).encode())
    assert status == 200
    assert json.loads(body)["response"]["allowed"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"{}", b'{"request": 5}'])
def test_nonsense_is_refused(address: tuple[str, int, Path], body: bytes) -> None:
    assert post(address, body)[0] in (400, 413)
