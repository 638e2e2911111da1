"""All codecs by name. Each record names the codec that made it.

A collection has one codec of factors. ``fp32`` holds the values as they are: another encoder uploads its gradients in
it, and the bank stores their factors. Records of retired codecs are only read, until `regrad recode` gives them
factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from bank_service.wire.codecs.base import Codec, GradientFormatError
from bank_service.wire.codecs.dense import Bf16Codec, Fp32Codec, Int8Codec
from bank_service.wire.codecs.factors import CHOICE, FactorsCodec, is_factors
from bank_service.wire.codecs.int4 import Int4Codec
from bank_service.wire.codecs.lowrank import LowRankCodec

DEFAULT_CODEC = "factors-4-1-8"
DENSE = Fp32Codec()
RETIRED_CODECS: Mapping[str, Codec] = MappingProxyType(
    {codec.name: codec for codec in (Bf16Codec(), Int8Codec(), Int4Codec(), *map(LowRankCodec, (32, 64, 128, 256)))}
)


def codec_named(name: str) -> Codec:
    """The codec of that name, which may be retired. GradientFormatError for an unknown one."""
    if is_factors(name):
        return FactorsCodec(name)
    found = DENSE if name == DENSE.name else RETIRED_CODECS.get(name)
    if found is None:
        raise GradientFormatError(f"codec must be {CHOICE} or {DENSE.name}, got {name!r}")
    return found


def check_choice(name: str) -> None:
    """GradientFormatError unless a collection can have the codec."""
    if not is_factors(name):
        raise GradientFormatError(f"codec must be {CHOICE}, got {name!r}; {DEFAULT_CODEC} is the default")
