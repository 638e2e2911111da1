"""URLs of Redis servers, taken apart."""

from __future__ import annotations

import pytest
from redis.asyncio.connection import parse_url

from bank_service.values.redis_url import RedisKind, RedisUrl


def test_one_server_keeps_its_url() -> None:
    for url in ("redis://:p%2Fw@h:7/1?ssl_cert_reqs=none", "rediss://h", "unix:///a/b.sock?db=1"):
        assert RedisUrl.parse(url, "redis_url") == RedisUrl(RedisKind.ONE, url)


def test_a_cluster_has_several_addresses_and_one_way_to_connect() -> None:
    url = RedisUrl.parse("rediss+cluster://user:p%2Fw@a:7000,b,[::1]:7002?ssl_ca_certs=/x", "redis_url")
    assert url.kind is RedisKind.CLUSTER and url.addresses == (("a", 7000), ("b", 6379), ("::1", 7002))
    settings = parse_url(url.base)
    assert settings["connection_class"].__name__ == "SSLConnection"
    assert (settings["username"], settings["password"], settings["ssl_ca_certs"]) == ("user", "p/w", "/x")


def test_sentinels_have_a_service_and_a_password_of_their_own() -> None:
    url = RedisUrl.parse("redis+sentinel://:pw@a,b:7001/bank/2?sentinel_password=s%26t&client_name=c", "redis_url")
    assert url.kind is RedisKind.SENTINEL and url.addresses == (("a", 26379), ("b", 7001)) and url.service == "bank"
    assert url.sentinel_options == (("password", "s&t"),)
    settings = parse_url(url.base)
    assert (settings["password"], settings["db"], settings["client_name"]) == ("pw", 2, "c")
    assert "pw" not in repr(url) and "s&t" not in repr(url)


@pytest.mark.parametrize(
    "url", ["redis+cluster://", "redis+cluster://a,,b", "redis+cluster://a/0", "redis+sentinel://a"]
)
def test_a_url_without_its_parts_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"redis_url must be like .*redis\+cluster://"):
        RedisUrl.parse(url, "redis_url")
