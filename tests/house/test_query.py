"""`regrad query`: each retrieval and filter, against a real bank."""

from __future__ import annotations

import asyncio
import json
import socket
import unicodedata
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from bank_service.service.server import BankServer
from bank_service.testing.client import Client
from bank_service.testing.hash_encoder import HashEmbedder, HashEncoder
from bank_service.values.config import BankConfig
from regrad_vllm.cli import main
from regrad_vllm.cli.filters import FilterFlag, filter_flag

pytestmark = pytest.mark.asyncio(loop_scope="module")

DOCUMENTS = {
    "de": ("the harbour of Orlen", {"lang": "de", "draft": ""}),
    "fr": ("the harbour of Brest", {"lang": "fr"}),
    "en": ("a lighthouse far away", {"lang": "en", "note": "a=b"}),
    "none": ("a lighthouse nearby", {}),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def target(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    config = BankConfig(data_dir=tmp_path_factory.mktemp("bank"))
    async with BankServer(config, HashEncoder(), HashEmbedder()) as server, Client(server.address.target) as client:
        for id, (text, metadata) in DOCUMENTS.items():
            await client.put(id, text, metadata=metadata)
        for id, text in {"zh": "南京长江大桥是一座桥。", "fr": "Renée habite à Brest."}.items():
            await client.put(id, text, namespace="scripts")
        yield client.target


async def found(target: str, capsys: pytest.CaptureFixture[str], *flags: str) -> list[dict[str, object]]:
    command = ["query", "the harbour of Orlen", "--bank", target, "--json", "--top-k", "10", *flags]
    assert await asyncio.to_thread(main, command) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(
    ("filters", "ids"),
    [
        (["lang=de"], {"de"}),
        (["lang=de", "lang=fr"], {"de", "fr"}),
        (["lang!=de"], {"fr", "en", "none"}),
        (["lang!=de", "lang!=fr"], {"en", "none"}),
        (["lang"], {"de", "fr", "en"}),
        (["!lang"], {"none"}),
        (["draft="], {"de"}),
        (["note=a=b"], {"en"}),
        (["lang", "!draft", "lang!=en"], {"fr"}),
        (["lang=nowhere"], set()),
    ],
)
async def test_a_filter_keeps_to_the_documents_that_match(
    target: str, capsys: pytest.CaptureFixture[str], filters: list[str], ids: set[str]
) -> None:
    flags = [word for text in filters for word in ("--filter", text)]
    assert {hit["id"] for hit in await found(target, capsys, *flags)} == ids


async def test_the_retrieval_chosen_is_the_one_that_answers(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    answers = {name: await found(target, capsys, "--retrieval", name) for name in ("dense", "lexical", "hybrid")}
    assert {name: len(hits) for name, hits in answers.items()} == {"dense": 4, "lexical": 2, "hybrid": 4}
    assert all(hit["score"] == hit["cosine"] for hit in answers["dense"])
    assert all(hit["score"] != hit["cosine"] for hit in answers["lexical"])
    assert answers["hybrid"][0]["score"] == round(2 / 61, 4)
    (only,) = await found(target, capsys, "--retrieval", "lexical", "--filter", "lang=fr")
    assert only["id"] == "fr"


async def test_the_sentences_nearest_to_the_text_are_shown(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    hits = await found(target, capsys, "--cue", "1")
    sentence = {"start": 0, "end": 20, "text": "the harbour of Orlen", "score": 1.0}
    assert {hit["id"]: hit["cue"] for hit in hits if hit["cue"]} == {"de": [sentence]}
    assert not any("cue" in hit for hit in await found(target, capsys))
    command = ["query", "the harbour of Orlen", "--bank", target, "--top-k", "2", "--cue", "2"]
    assert await asyncio.to_thread(main, command) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=1)[1] for line in shown[1::2]] == [
        "0–20  the harbour of Orlen",
        "0–20  the harbour of Brest",
    ]


@pytest.mark.parametrize(("text", "id"), [("大桥", "zh"), (unicodedata.normalize("NFD", "Renée"), "fr")])
async def test_words_are_found_in_every_script_and_spelling(
    target: str, capsys: pytest.CaptureFixture[str], text: str, id: str
) -> None:
    for retrieval, num_hits in (("lexical", 1), ("hybrid", 2)):
        command = ["query", text, "--bank", target, "--json", "--namespace", "scripts", "--top-k", "2"]
        assert await asyncio.to_thread(main, [*command, "--retrieval", retrieval]) == 0
        hits = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert len(hits) == num_hits and hits[0]["id"] == id
    assert hits[0]["score"] > 1 / 61 + 1 / 63, "else hybrid found it by its vector alone"


async def test_an_answer_says_the_sequence_that_it_reflects(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert {hit["sequence"] for hit in await found(target, capsys)} == {6}
    (first,) = await found(target, capsys, "--as-of", "1")
    assert (first["id"], first["sequence"]) == ("de", 1)
    assert await asyncio.to_thread(main, ["query", "x", "--bank", target, "--as-of", "0"]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "no document matches, as of sequence 0\n")


async def test_too_many_conditions_are_one_line_that_says_so(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [word for number in range(17) for word in ("--filter", f"key{number}")]
    assert await asyncio.to_thread(main, ["query", "x", "--bank", target, *flags]) == 1
    assert "filter.conditions must be at most 16, got 17" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "",
        "!",
        "!!x",
        "!x=y",
        "!x!=y",
        "=x",
        "!=x",
        "size>3",
        "size<=3",
        "!size<3",
        "lang==de",
        "lang!==de",
        "a= =b",
        "a = = b",
        "a ! = b",
    ],
)
async def test_what_is_no_filter_is_wrong_usage(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["query", "x", "--filter", text])
    assert raised.value.code == 2
    assert (
        f"must be KEY=VALUE, KEY!=VALUE, KEY or !KEY (one =, and no KEY with !, < or >), got {text!r}"
        in capsys.readouterr().err
    )


async def test_the_first_comparison_divides_key_and_value() -> None:
    assert filter_flag("a!=b=c") == FilterFlag("a", "not_equals", "b=c")
    assert filter_flag("a=b!=c") == FilterFlag("a", "equals", "b!=c")
    assert filter_flag("a=line\nline") == FilterFlag("a", "equals", "line\nline")
    assert filter_flag(" a  != b c ") == FilterFlag("a", "not_equals", "b c")
    assert filter_flag("a=<b>") == FilterFlag("a", "equals", "<b>")


async def test_a_bank_that_says_nothing_is_waited_for_as_long_as_was_said(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never says a word
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        assert await asyncio.to_thread(main, ["query", "a text", "--bank", address, "--timeout", "1"]) == 1
    assert f"the bank at {address} gave no answer in time" in capsys.readouterr().err


async def test_a_list_of_nodes_is_told_how_to_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert await asyncio.to_thread(main, ["query", "a text", "--bank", "10.0.0.1:1,10.0.0.2:2"]) == 1
    assert "ipv4:IP:PORT,IP:PORT" in capsys.readouterr().err
