"""The flags that vLLM's engine must have for a learner, and the check that it was started with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regrad_vllm.learner import Learner
from regrad_vllm.serve.settings import SettingsError

PLUGIN_NAME = "regrad"
EXTENSION_CLASS = "regrad_vllm.serve.worker.extension.RegradWorkerExtension"
# The setting tested on a GPU: CUDA graphs for decoding steps, without torch.compile. Our LoRA kernels are untested with
# torch.compile.
GPU_COMPILATION = '{"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}'
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values that vLLM accepts for --max-lora-rank
# These find KV by vLLM's own block hashes, which have the adapter's name in them. Read in 0.26, 0.32 and 0.33.
_KV_CONNECTORS = ("OffloadingConnector", "SimpleCPUOffloadConnector", "MooncakeStoreConnector")
# vLLM merges these projections into one module. The learner names them one by one.
_MERGED = {
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
}


def merged_modules(learner: Learner) -> tuple[str, ...]:
    """The learner's modules by vLLM's names for them. So vLLM adds LoRA only to these modules."""
    names: dict[str, None] = {}
    for module in learner.layout.modules:
        parent, _, leaf = module.rpartition(".")
        names[f"{parent}.{_MERGED.get(leaf, leaf)}"] = None
    return tuple(names)


def lora_rank(rank: int) -> int:
    """The least --max-lora-rank for an adapter of this rank in one of vLLM's slots. SettingsError if there is none.

    ReGrad's own requests need no such rank, because our layers have φ* themselves.
    """
    for known in _LORA_RANKS:
        if known >= rank:
            return known
    raise SettingsError(f"an adapter's rank must be at most {_LORA_RANKS[-1]}, which is vLLM's limit, got {rank}")


def check_engine_settings(vllm_config: Any, learner: Learner) -> None:
    """Checks that vLLM's flags fit the learner. SettingsError says which flag to set."""
    lora = vllm_config.lora_config
    if lora is None:
        raise SettingsError("the engine must run with LoRA; set --enable-lora")
    mode = vllm_config.compilation_config.mode
    extension = vllm_config.parallel_config.worker_extension_cls
    refused: list[tuple[Any, str]] = [
        (
            lora.fully_sharded_loras,
            "--fully-sharded-loras must be off: its layers bypass our kernels; leave the flag out",
        ),
        (
            getattr(lora, "specialize_active_lora", False),
            "--specialize-active-lora must be off: vLLM chooses a captured graph by the number of adapters, and counts "
            "each of our requests as one; leave the flag out",
        ),
        (
            lora.enable_tower_connector_lora,
            "--enable-tower-connector-lora must be off: with it vLLM sets the adapters several times a step",
        ),
        (
            vllm_config.model_config.enable_sleep_mode,
            "--enable-sleep-mode must be off: a sleeping worker loses its documents; leave the flag out",
        ),
        (
            vllm_config.parallel_config.use_ubatching,
            "--enable-dbo and --ubatch-size must be off: vLLM doesn't cut LoRA's rows with the batch's",
        ),
        (
            vllm_config.cache_config.kv_sharing_fast_prefill,
            "--kv-sharing-fast-prefill must be off: its layers have other rows than LoRA is told of",
        ),
        (
            vllm_config.device_config.device_type == "cpu" and mode,
            "vLLM's compilation mode must be NONE for LoRA on CPUs, where our kernels can't be compiled in, "
            f"got {getattr(mode, 'name', mode)}; set --enforce-eager",
        ),
        (extension != EXTENSION_CLASS, f"--worker-extension-cls must be {EXTENSION_CLASS}, got {extension!r}"),
    ]
    for is_so, reason in refused:
        if is_so:
            raise SettingsError(reason)
    if vllm_config.kv_transfer_config is not None:
        check_kv_connectors(vars(vllm_config.kv_transfer_config))


def check_kv_connectors(config: Mapping[str, Any]) -> None:
    """SettingsError if a KV connector may mix up requests with different adapters.

    config: fields of vLLM's KVTransferConfig.
    """
    used = [config]
    if config.get("kv_connector") == "MultiConnector" and not config.get("kv_connector_module_path"):
        used = (config.get("kv_connector_extra_config") or {}).get("connectors", [])
    for connector in used:
        name, path = connector.get("kv_connector"), connector.get("kv_connector_module_path")
        if name is not None and (name not in _KV_CONNECTORS or path):
            raise SettingsError(
                f"--kv-transfer-config must name {', '.join(_KV_CONNECTORS)}, or a MultiConnector of these alone, got "
                f"{path or name}: others may find KV by its tokens, so one request would get the KV of another's "
                "documents"
            )
