"""All codecs by name. Each record names the codec that made it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from bank_service.wire.codecs.base import Codec, GradientFormatError
from bank_service.wire.codecs.dense import Bf16Codec, Fp32Codec, Int8Codec
from bank_service.wire.codecs.factors import FactorsCodec, is_factors
from bank_service.wire.codecs.int4 import Int4Codec
from bank_service.wire.codecs.lowrank import LowRankCodec


def _registry(*codecs: Codec) -> Mapping[str, Codec]:
    return MappingProxyType({codec.name: codec for codec in codecs})


# A collection can choose among these.
CODECS: Mapping[str, Codec] = _registry(Fp32Codec(), Bf16Codec(), Int8Codec(), Int4Codec(), LowRankCodec(64))
# Older collections may have these codecs, and keep them until they are recoded. Their format is the one of lowrank64.
RETIRED_CODECS: Mapping[str, Codec] = _registry(*map(LowRankCodec, (32, 128, 256)))
DEFAULT_CODEC = Int8Codec.name


def codec_named(name: str) -> Codec:
    """The codec of that name. Retired codecs are found too. GradientFormatError lists the codecs that can be chosen."""
    if is_factors(name):
        return FactorsCodec(name)
    found = CODECS.get(name) or RETIRED_CODECS.get(name)
    if found is None:
        raise GradientFormatError(f"codec must be factors-P-Q-BITS or one of {', '.join(sorted(CODECS))}, got {name!r}")
    return found


def check_choice(name: str) -> None:
    """GradientFormatError, with a remedy, unless a new collection may have the codec."""
    codec_named(name)
    if name in RETIRED_CODECS:
        raise GradientFormatError(
            f"codec must be one of {', '.join(sorted(CODECS))}, got {name!r}, which is retired; a collection that has "
            "it keeps it without being told, until `regrad recode` gives it another"
        )
