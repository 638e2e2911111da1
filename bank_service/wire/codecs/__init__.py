"""The codecs by name. A record says which one made it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from bank_service.wire.codecs.base import Codec, GradientFormatError
from bank_service.wire.codecs.dense import Bf16Codec, Fp32Codec, Int8Codec
from bank_service.wire.codecs.int4 import Int4Codec
from bank_service.wire.codecs.lowrank import LowRankCodec


def _registry(*codecs: Codec) -> Mapping[str, Codec]:
    return MappingProxyType({codec.name: codec for codec in codecs})


CODECS: Mapping[str, Codec] = _registry(
    Fp32Codec(), Bf16Codec(), Int8Codec(), Int4Codec(), *map(LowRankCodec, (32, 64, 128, 256))
)
DEFAULT_CODEC = Int8Codec.name


def codec_named(name: str) -> Codec:
    """The codec of that name; GradientFormatError lists the known ones."""
    if name not in CODECS:
        raise GradientFormatError(f"codec must be one of {', '.join(sorted(CODECS))}, got {name!r}")
    return CODECS[name]
