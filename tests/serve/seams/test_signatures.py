"""The seams in versions of vLLM that are not installed here, by the signatures that their sources had."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.tools.vllm_signatures import TABLE, as_text, signature
from regrad_vllm.serve.seams.seam import READ_IN, Seam
from regrad_vllm.serve.seams.server_seams import SERVER_SEAMS
from regrad_vllm.serve.seams.worker_seams import CPU_SEAMS, WORKER_SEAMS

TABLE_OF: dict[str, dict[str, list[str] | None]] = json.loads(TABLE.read_text())


@pytest.mark.parametrize("version", TABLE_OF)
@pytest.mark.parametrize("seam", WORKER_SEAMS + CPU_SEAMS + SERVER_SEAMS, ids=lambda seam: seam.path)
def test_a_seam_is_in_each_version_that_was_read(version: str, seam: Seam) -> None:
    name = f"{seam.module}:{seam.path}"
    assert name in TABLE_OF[version], "make the table again: python -m benchmarks.tools.vllm_signatures"
    found = TABLE_OF[version][name]
    assert found is not None, f"vLLM {version} has no {name}"
    if seam.parameters is not None:
        assert tuple(found) == seam.parameters or (seam.others_may_follow and set(seam.parameters) <= set(found))


def test_the_table_has_the_versions_that_the_seams_name() -> None:
    assert list(TABLE_OF) == READ_IN.split(", ")
    assert as_text(TABLE_OF) == TABLE.read_text()


SOURCE = """
from vllm.base import Base, elsewhere
class Child(Base):
    def own(self, a, *rest, b=1, **more): ...
class GrandChild(Child):
    attribute = 1
async def call(x, /, y): ...
"""


@pytest.mark.parametrize(
    ("path", "parameters"),
    [
        ("Child.own", ["self", "a", "rest", "b", "more"]),
        ("GrandChild.own", ["self", "a", "rest", "b", "more"]),
        ("GrandChild.of_base", ["self", "z"]),
        ("GrandChild", []),
        ("call", ["x", "y"]),
        ("elsewhere", ["q"]),
        ("Child.missing", None),
        ("Nothing.own", None),
    ],
)
def test_a_signature_is_read_from_the_source(tmp_path: Path, path: str, parameters: list[str] | None) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "child.py").write_text(SOURCE)
    (tmp_path / "vllm" / "base.py").write_text("class Base:\n def of_base(self, z): ...\ndef elsewhere(q): ...\n")
    assert signature(tmp_path, "vllm.child", path) == parameters
    assert signature(tmp_path, "vllm.nowhere", path) is None
