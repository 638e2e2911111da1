"""Every setting of the plugin, read from the environment (``REGRAD_*``) in one place.

The plugin runs in vLLM's processes and doesn't start them. They all inherit the environment, so the settings are there.
``regrad serve`` has a flag for each setting and exports it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from bank_service.wire.credentials import BankCredentials
from bank_service.wire.limits import DEFAULT_CUE_SENTENCES, DEFAULT_NAMESPACE, MAX_CUE_SENTENCES
from bank_service.wire.ports import DEFAULT_BANK, check_address
from regrad_vllm.client.values import RETRIEVALS, Retrieval
from regrad_vllm.flags import as_text, on_or_off

PREFIX = "REGRAD_"
MCP_TOKEN = "REGRAD_MCP_TOKEN"  # of `regrad mcp`; no setting, and no fault in a server's environment
OnError = Literal["fail_open", "fail_closed"]
Documents = Literal["off", "read", "write"]
# The text put into the prompt: none, the nearest sentences, the documents; auto: sentences, then documents if unsure.
Mode = Literal["blind", "cue", "icl", "auto"]
MODES: tuple[Mode, ...] = get_args(Mode)
MAX_TOP_K = 64
MAX_GAMMA = 16.0
# The variables of one service, after its name. Kubernetes sets them in every container of the namespace.
_SERVICE_VARIABLE = re.compile(r"SERVICE_(HOST|PORT(_\w+)?)|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?")


class SettingsError(ValueError):
    """A setting is missing or wrong. The message names the setting and its rule."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of one server. The environment variable of a field is REGRAD_ and its name in capitals."""

    learner: Path  # its folder; one ships for the default model
    bank: str = DEFAULT_BANK  # host:port of the bank
    namespace: str = DEFAULT_NAMESPACE  # for requests that name no namespace
    top_k: int | None = None  # documents of a request; None: the learner's, at most --regrad-max-documents
    max_documents: int = 16  # of one request, at most 64; bounds regrad.top_k and regrad.document_ids
    gamma: float | None = None  # strength; None: the learner's
    min_score: float | None = None  # least cosine of a document; None: all hits count
    retrieval: Retrieval = "dense"  # dense, lexical (BM25) or hybrid (both)
    mode: Mode = "cue"  # what a prompt gets of the documents: blind nothing, cue sentences, icl all, auto cue or icl
    cue_sentences: int = DEFAULT_CUE_SENTENCES  # of a prompt in mode cue, of all documents together, at most 4
    min_confidence: float = 0.7  # in mode auto an answer with less, from 0 to 1, is asked for again in mode icl
    default: bool = False  # on: requests to the base model's own name have ReGrad too
    on_error: OnError = "fail_open"  # if ReGrad is on by default: the base model answers; fail_closed: an error
    documents: Documents = "read"  # what HTTP may do with documents: off: nothing, read: no change, write: all
    system_prompt: bool = True  # on: a request without a system prompt gets the learner's
    arena_dir: Path | None = None  # folder of the arena; None: shared memory
    arena_bytes: int = 256 * 2**20  # gradients of an API server; on CPUs by default ≤ a third of the free shared memory
    worker_bytes: int = 256 * 2**20  # documents of each worker; on CPUs by default ≤ a third of the free shared memory
    bank_timeout_ms: int = 5000  # for each call to the bank
    bank_token_file: Path | None = None  # the token for the bank; None: no token
    bank_ca: Path | None = None  # PEM of the bank's authority, "system" for gRPC's own list; None: no TLS
    bank_cert: Path | None = None  # PEM of your own certificate, if the bank asks for one
    bank_key: Path | None = None  # PEM of its key
    bank_concurrency: int = 8  # requests that ask the bank at a time; others wait
    check_base: bool = True  # compare the base model's files with the learner's base at the start
    kept_requests: int = 1000  # for GET /v1/regrad/requests

    def __post_init__(self) -> None:
        try:
            check_address(self.bank, "REGRAD_BANK")
        except ValueError as error:
            raise SettingsError(str(error)) from error
        host, _, port = self.bank.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise SettingsError(f"REGRAD_BANK must be host:port, got {self.bank!r}")
        if not self.namespace:
            raise SettingsError("REGRAD_NAMESPACE must not be empty; leave it out for 'default'")
        for name, low, high in (
            ("max_documents", 1, MAX_TOP_K),
            ("gamma", -MAX_GAMMA, MAX_GAMMA),
            ("cue_sentences", 1, MAX_CUE_SENTENCES),
            ("min_confidence", 0, 1),
            ("min_score", -1, 1),
            ("arena_bytes", 1, 2**50),
            ("worker_bytes", 1, 2**50),
            ("bank_timeout_ms", 1, 600_000),
            ("bank_concurrency", 1, 10_000),
            ("kept_requests", 0, 10_000_000),
        ):
            value = getattr(self, name)
            # Written so that NaN fails too.
            if value is not None and not low <= value <= high:
                raise SettingsError(f"{variable(name)} must be in {low}..{high}, got {value}")
        if self.top_k is not None and not 1 <= self.top_k <= self.max_documents:
            raise SettingsError(
                f"REGRAD_TOP_K must be in 1..{self.max_documents}, got {self.top_k}; REGRAD_MAX_DOCUMENTS, at most "
                f"{MAX_TOP_K}, sets the limit"
            )

    def top_k_for(self, learner_top_k: int) -> int:
        """The documents of a request that names no number. ``learner_top_k``: the learner's own number."""
        return self.top_k or min(learner_top_k, self.max_documents)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Settings | None:
        """The settings. None if REGRAD_LEARNER is unset, which means that the plugin is off.

        SettingsError for an unknown variable that starts with REGRAD_, and for a bad value. The secret of `regrad mcp`
        and variables that Kubernetes sets for a service, such as regrad-bank, don't count.
        """
        if not environment.get(variable("learner")):
            return None
        known = {variable(name): name for name in _PARSERS}
        values: dict[str, Any] = {}
        services = [key.removesuffix("SERVICE_HOST") for key in environment if key.endswith("_SERVICE_HOST")]
        for key, text in environment.items():
            if not key.startswith(PREFIX) or any(_is_of_service(key, text, service) for service in services):
                continue
            if key == MCP_TOKEN:
                continue
            if key not in known:
                raise SettingsError(f"{key} must be one of {', '.join(sorted(known))}; remove it or mend its name")
            if text == "":  # the same as unset, because a compose file can't unset a variable
                continue
            name = known[key]
            try:
                values[name] = _PARSERS[name](text)
            except ValueError as error:
                raise SettingsError(f"{key} must be {error}, got {text!r}") from error
        return cls(**values)

    @property
    def bank_credentials(self) -> BankCredentials:
        """The credentials for the bank. SettingsError if the files contradict each other."""
        try:
            return BankCredentials(
                token_file=self.bank_token_file, ca=self.bank_ca, cert=self.bank_cert, key=self.bank_key
            )
        except ValueError as error:
            raise SettingsError(f"{error}; see REGRAD_BANK_CA, REGRAD_BANK_CERT, REGRAD_BANK_KEY") from None

    def environment(self) -> dict[str, str]:
        """The environment variables for these settings."""
        texts: dict[str, str] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if value is not None:
                texts[variable(item.name)] = as_text(value)
        return texts


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return PREFIX + name.upper()


def _is_of_service(key: str, text: str, service: str) -> bool:
    """Whether Kubernetes sets this variable for a service. Its PORT is a URL, and a mere number is the user's."""
    name = key.removeprefix(service)
    return name != key and bool(_SERVICE_VARIABLE.fullmatch(name)) and (name != "PORT" or "://" in text)


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("a whole number") from None


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError("a number") from None
    if not math.isfinite(value):
        raise ValueError("a finite number")
    return value


def _on_error(text: str) -> OnError:
    if text == "fail_open":
        return "fail_open"
    if text == "fail_closed":
        return "fail_closed"
    raise ValueError("fail_open or fail_closed")


def _one_of(choices: Sequence[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text in choices:
            return text
        raise ValueError(f"one of {', '.join(choices)}")

    return parse


_PARSERS: Mapping[str, Callable[[str], object]] = {
    "learner": Path,
    "bank": str,
    "namespace": str,
    "top_k": _integer,
    "max_documents": _integer,
    "gamma": _number,
    "min_score": _number,
    "retrieval": _one_of(RETRIEVALS),
    "mode": _one_of(MODES),
    "cue_sentences": _integer,
    "min_confidence": _number,
    "default": on_or_off,
    "on_error": _on_error,
    "documents": _one_of(get_args(Documents)),
    "system_prompt": on_or_off,
    "arena_dir": Path,
    "arena_bytes": _integer,
    "worker_bytes": _integer,
    "bank_timeout_ms": _integer,
    "bank_token_file": Path,
    "bank_ca": Path,
    "bank_cert": Path,
    "bank_key": Path,
    "bank_concurrency": _integer,
    "check_base": on_or_off,
    "kept_requests": _integer,
}
