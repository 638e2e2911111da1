"""The examples of docs/frameworks.md run as they stand there, with the README's bank and server.

LlamaIndex and LiteLLM run in a clean environment of their own, with the project's wheel and nothing of the repository.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from regrad_vllm.client import Bank
from tests.house.served import House
from tests.wheel import build_wheel

QUILEGREN = "['ship-the-quilegren']"


def assert_names_the_quilegren(said: str) -> None:
    """The answer's documents, and those of the retriever with their scores."""
    lines = said.splitlines()
    assert QUILEGREN in lines and any(line.startswith("ship-the-quilegren 0.") for line in lines), said


@pytest.mark.only_test_all
@pytest.mark.timeout(600)
def test_the_example_of_langchain_answers_finds_and_deletes(house: House, tmp_path: Path) -> None:
    house.run("ingest", tmp_path)
    said = house.run("langchain", tmp_path)
    assert_names_the_quilegren(said)
    assert "'title': 'Orlen'" in said and "'page': 7" in said
    with Bank(house.bank) as bank:
        assert bank.stats().namespaces["notes"] == 0, "the example deletes its text"


@pytest.fixture(scope="module")
def clean_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a clean environment with our wheel, LlamaIndex and LiteLLM."""
    folder = tmp_path_factory.mktemp("clean")
    subprocess.run([sys.executable, "-m", "venv", folder / "env"], check=True)
    python = folder / "env" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", f"{build_wheel(folder)}[llama-index]", "litellm>=1.80,<2"]
    subprocess.run(install, check=True, capture_output=True)
    return python


@pytest.mark.only_test_all
@pytest.mark.timeout(900)
def test_llamaindex_and_litellm_work_in_a_clean_environment(
    house: House, clean_python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks another machine for prices
    version = subprocess.run([clean_python.parent / "regrad", "--version"], check=True, capture_output=True, text=True)
    assert version.stdout.startswith("regrad 0.")
    house.run("ingest", tmp_path)
    assert_names_the_quilegren(house.run("llama_index", tmp_path, clean_python))
    assert QUILEGREN in house.run("litellm", tmp_path, clean_python).splitlines()


PROGRAM = """
import asyncio, sys
from llama_index.core.llms import ChatMessage
from regrad_vllm.client import Bank, Document
from regrad_vllm.frameworks.llama_index import Regrad, RegradRetriever

with Bank(sys.argv[1]) as bank:
    list(bank.ingest([Document("pier", "The pier is closed.", "Orlen", {"lang": "en"})], namespace="index"))
    (found,) = RegradRetriever(bank, namespace="index", filter={"lang": ["en", "de"]}).retrieve("Is the pier closed?")
    assert found.node.text == "The pier is closed." and found.node.metadata == {"lang": "en", "title": "Orlen"}
    assert not RegradRetriever(bank, namespace="index", filter={"lang": "de"}).retrieve("Is the pier closed?")
llm = Regrad(
    model="smollm2", api_base=sys.argv[2], api_key="none", temperature=0, max_tokens=4, regrad={"namespace": "index"}
)
question = [ChatMessage("Is the pier closed?")]
parts = list(llm.stream_chat(question))
assert parts[0].additional_kwargs["regrad"]["namespace"] == "index"
answer = asyncio.run(llm.achat(question, regrad={"gamma": 0.5}))
assert answer.additional_kwargs["regrad"]["gamma"] == 0.5 and answer.additional_kwargs["total_tokens"] > 4
assert answer.additional_kwargs["regrad"]["documents"][0]["id"] == "pier"
assert llm.complete("Is the pier closed?").additional_kwargs["regrad"]["documents"]
assert "regrad" not in llm.chat(question, regrad={"enabled": False}).additional_kwargs
assert len(parts) > 2
"""


@pytest.mark.only_test_all
@pytest.mark.timeout(900)
def test_llamaindex_filters_streams_and_takes_the_options_of_each_call(house: House, clean_python: Path) -> None:
    command = [clean_python, "-c", PROGRAM, house.bank, f"http://{house.server}/v1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


@pytest.mark.only_test_all
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("npm") is None, reason="npm must be on the PATH")
def test_the_example_of_the_vercel_ai_sdk_reads_the_documents(house: House, tmp_path: Path) -> None:
    house.run("ingest", tmp_path)
    packages = ["ai@7", "@ai-sdk/openai-compatible@3"]
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", *packages]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert "[ 'ship-the-quilegren' ]" in house.run("vercel", tmp_path).splitlines()
