"""The URL of an object store. Credentials come from the environment, so a URL with any is refused and never shown."""

from __future__ import annotations

import os
import re
from urllib.parse import urlsplit

SCHEMES = ("s3://", "gs://", "az://")
_ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_USER = re.compile(r"(?<=://)[^/]*@")  # name and password in a URL


def check_objects_url(url: str, setting: str) -> None:
    """ValueError, which names ``setting``, unless the URL is a bucket, or a prefix in one. ValueError also where the
    environment has an endpoint of S3 that is no URL."""
    for name in _ENDPOINTS:
        if url.startswith("s3://") and not os.environ.get(name, "http://-").startswith(("http://", "https://")):
            raise ValueError(f"{name} must begin with http:// or https://; mend it in the environment, or unset it")
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
