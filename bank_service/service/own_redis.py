"""The address of the operator's own Redis server."""

from __future__ import annotations

from bank_service.service.private_file import check_private
from bank_service.values.config import BankConfig
from bank_service.values.redis_url import check_redis_url


def own_redis_url(config: BankConfig) -> str | None:
    """The URL, as given or out of its file. None: the bank starts a server of its own. OSError, ValueError."""
    if config.redis_url_file is None:
        return config.redis_url
    check_private(config.redis_url_file, "redis_url_file")
    url = config.redis_url_file.read_text("utf-8", errors="replace").strip()
    check_redis_url(url, "redis_url_file's URL")
    return url
