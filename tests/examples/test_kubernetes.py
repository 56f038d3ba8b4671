"""The manifests in examples/kubernetes are what Kubernetes' published schemas say."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from samepage.service.policy import parse

FILES = sorted((Path(__file__).parents[2] / "examples" / "kubernetes").glob("*.yaml"))
validator = pytest.importorskip("kubernetes_validate")
yaml = pytest.importorskip("yaml")


def documents(file: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(file.read_text()))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_manifest_is_what_the_schemas_say(file: Path) -> None:
    for document in documents(file):
        validator.validate(document, validator.latest_version(), strict=True)


def test_a_manifest_with_a_field_that_there_is_not_is_found() -> None:
    document = documents(FILES[0])[0]
    document["spec"]["template"]["spec"]["hostPid"] = True
    with pytest.raises(validator.ValidationError):
        validator.validate(document, validator.latest_version(), strict=True)


def test_the_policy_in_the_manifest_is_one_that_the_daemon_takes() -> None:
    policies = [document["data"]["policy.toml"] for file in FILES for document in documents(file) if "data" in document]
    for policy in policies:
        assert tomllib.loads(policy)
        parse(policy.encode(), "policy.toml")
    assert policies
