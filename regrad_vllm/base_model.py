"""Loads the base model W, and names it by its content. W is never changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrad_vllm.layout import Layout

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The keys of config.json that change the model's function. The others (library version, dtype on disk, paths) may
# differ between two copies of one model.
_CONFIG_KEYS = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "hidden_act", "rms_norm_eps", "tie_word_embeddings",
    "attention_bias", "mlp_bias", "sliding_window", "use_sliding_window", "max_window_layers", "partial_rotary_factor",
    "embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling", "logit_scale",
    "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "hidden_activation",
)  # fmt: skip
_HASH_CHUNK_BYTES = 1 << 24


class BaseModelError(ValueError):
    """A model folder can't be used. The message gives the reason."""


def base_digest(folder: str | Path, *, config: str | Path | None = None, tokenizer: str | Path | None = None) -> str:
    """SHA-256 over a model folder's weights, architecture, vocabulary and chat template, 64 hex digits.

    config, tokenizer: the folders with config.json, and with tokenizer and chat template. None: the same folder.
    Weights count by tensor (name, dtype, shape, bytes), so neither sharding nor the order of files matters. It reads
    the whole model, at about 1 s per GB.
    """
    folder = Path(folder)
    state = hashlib.sha256(b"regrad.base.v1\0")
    architecture = _read_json(Path(config or folder) / "config.json")
    plain = {key: architecture[key] for key in _CONFIG_KEYS if architecture.get(key) is not None}
    state.update(json.dumps({**plain, **_positions(architecture)}, sort_keys=True).encode())
    text = Path(tokenizer or folder)
    state.update(json.dumps(_tokenizer_parts(text), sort_keys=True, ensure_ascii=False).encode())
    state.update(_chat_template(text).encode())
    for name, dtype, shape, path, begin, end in sorted(_tensors(folder)):
        state.update(f"{name}|{dtype}|{shape}|".encode())
        with path.open("rb") as file:
            file.seek(begin)
            left = end - begin
            while left > 0:
                chunk = file.read(min(left, _HASH_CHUNK_BYTES))
                if not chunk:
                    raise BaseModelError(f"{path} must hold {end} bytes, it ends early; copy the model again")
                state.update(chunk)
                left -= len(chunk)
    return state.hexdigest()


def load_base_model(
    folder: str | Path, *, dtype: torch.dtype, device: str = "cpu", attention: str = "sdpa"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The frozen model in eval mode and its tokenizer.

    attention: "sdpa", or "eager" if a second derivative is needed. A model with a soft cap in its attention gets
    "eager" always, because the library's "sdpa" leaves the cap out.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if getattr(AutoConfig.from_pretrained(folder), "attn_logit_softcapping", None) is not None:
        attention = "eager"
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    model.to(device).eval().requires_grad_(False)
    return model, AutoTokenizer.from_pretrained(folder)


def fast_dtype(device: str) -> torch.dtype:
    """The faster type to train an adapter in: bfloat16, or float32 on a CPU that is slow at bfloat16.

    A step of ``learn.continual`` on four documents took 110 s in bfloat16 and 2.7 s in float32, on two cores of an AMD
    EPYC without AVX-512 (`regrad eval --in-process --methods cpt`).
    """
    import torch

    return torch.float32 if device == "cpu" and not has_wide_vectors() else torch.bfloat16


def has_wide_vectors() -> bool:
    """Whether PyTorch is fast at bfloat16 on this CPU, by its vector instructions.

    True if the system doesn't list the instructions. vLLM then makes its own choice.
    """
    try:
        flags = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return True
    return "avx512f" in flags or "bf16" in flags


def build_layout(model: PreTrainedModel, *, rank: int, layers: Sequence[int], projections: Sequence[str]) -> Layout:
    """The layout of ``projections`` (such as "gate_proj") in the ``layers`` of ``model``."""
    import torch

    found: list[tuple[str, int, int]] = []
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    for layer in layers:
        for projection in projections:
            names = [name for name in linears if f".layers.{layer}." in name and name.endswith(f".{projection}")]
            if len(names) != 1:
                known = sorted({name.rsplit(".", 1)[1] for name in linears if ".layers." in name})
                raise BaseModelError(
                    f"layer {layer} must have one linear module {projection!r}, found {names}; has {known}"
                )
            found.append((names[0], linears[names[0]].in_features, linears[names[0]].out_features))
    return Layout.build(rank, found)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise BaseModelError(f"{path} does not exist; a model folder in Hugging Face format is needed") from error
    if not isinstance(document, dict):
        raise BaseModelError(f"{path} must hold a JSON object, got {type(document).__name__}")
    return document


def _positions(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary embedding and attention pattern in one spelling. Versions of the library save them differently."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = float(config.get("rope_theta") or rope.pop("rope_theta", None) or 10000.0)
    rope.pop("rope_theta", None)
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    layer_types = config.get("layer_types") or []
    return {
        "rope": {"rope_type": kind, "rope_theta": theta, **{k: v for k, v in rope.items() if v is not None}},
        "layer_types": layer_types if set(layer_types) - {"full_attention"} else [],
    }


def _tokenizer_parts(folder: Path) -> dict[str, Any]:
    """The settings that turn text into tokens. A null setting counts as absent."""
    tokenizer = _read_json(folder / "tokenizer.json")
    model = tokenizer.get("model", {})
    added = [(entry["id"], entry["content"], entry["special"]) for entry in tokenizer.get("added_tokens") or ()]
    steps = {name: _without_nulls(tokenizer.get(name)) for name in ("normalizer", "pre_tokenizer", "post_processor")}
    return {"vocab": model.get("vocab"), "merges": model.get("merges"), "added_tokens": sorted(added), **steps}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _chat_template(folder: Path) -> str:
    separate = folder / "chat_template.jinja"
    if separate.exists():
        return separate.read_text("utf-8")
    settings = folder / "tokenizer_config.json"
    return str(_read_json(settings).get("chat_template") or "") if settings.exists() else ""


def _tensors(folder: Path) -> list[tuple[str, str, str, Path, int, int]]:
    """(name, dtype, shape, file, first byte, end) of every tensor in the folder's safetensors files."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise BaseModelError(f"{folder} must hold model*.safetensors; convert the model with save_pretrained first")
    found = []
    for path in files:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if header_bytes > 100 << 20:
                raise BaseModelError(f"{path} is not a safetensors file: header of {header_bytes} bytes")
            header = json.loads(file.read(header_bytes))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            base = 8 + header_bytes
            found.append((name, entry["dtype"], json.dumps(entry["shape"]), path, base + begin, base + end))
    return found
