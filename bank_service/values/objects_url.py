"""The URL of an object store. Credentials come from the environment, so a URL with any is refused and never shown."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

SCHEMES = ("s3://", "gs://", "az://")
_USER = re.compile(r"(?<=://)[^/]*@")  # name and password in a URL


def check_objects_url(url: str, setting: str) -> None:
    """ValueError, which names ``setting``, unless the URL is a bucket, or a prefix in one."""
    parts = urlsplit(url)
    is_plain = "@" not in parts.netloc and not parts.query and not parts.fragment
    if not url.startswith(SCHEMES) or not parts.netloc or not is_plain or ".." in parts.path.split("/"):
        raise ValueError(
            f"{setting} must be like s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX, without "
            f"credentials and options, which the environment has, got {shown(url)!r}"
        )


def shown(place: str) -> str:
    """A URL or folder for a message: without a password."""
    return _USER.sub("…@", place)[:200]
