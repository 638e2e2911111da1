"""All codecs by name. Each record names the codec that made it.

A collection has one codec of factors. ``fp32`` holds the values as they are: another encoder uploads its gradients in
it, and the bank stores their factors. Records of retired codecs are only read, until `regrad recode` gives them
factors.
"""

from __future__ import annotations

from bank_service.wire.codecs.base import Codec, Decoder, GradientFormatError
from bank_service.wire.codecs.factors import CHOICE, FactorsCodec, is_factors
from bank_service.wire.codecs.fp32 import Fp32Codec
from bank_service.wire.codecs.retired import RETIRED_CODECS

DEFAULT_CODEC = "factors-4-1-8"
DENSE = Fp32Codec()


def codec_named(name: str) -> Decoder:
    """The codec of that name, for reading. It may be retired. GradientFormatError for an unknown one."""
    return RETIRED_CODECS[name] if name in RETIRED_CODECS else encoder_named(name)


def encoder_named(name: str) -> Codec:
    """The codec of that name, for writing. GradientFormatError for an unknown or retired one."""
    if is_factors(name):
        return FactorsCodec(name)
    if name != DENSE.name:
        raise GradientFormatError(f"codec must be {CHOICE}, or {DENSE.name}, got {name!r}")
    return DENSE


def check_choice(name: str) -> None:
    """GradientFormatError unless a collection can have the codec."""
    if not is_factors(name):
        raise GradientFormatError(f"codec must be {CHOICE}, got {name!r}; {DEFAULT_CODEC} is the default")
