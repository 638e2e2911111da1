"""The flags that vLLM's engine must have, checked when it has started."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vllm.config.compilation import CompilationMode
from vllm.config.kv_transfer import KVTransferConfig
from vllm.config.lora import LoRAConfig
from vllm.engine.arg_utils import EngineArgs

from regrad_vllm.learner import Learner
from regrad_vllm.serve.api.endpoint import check_base
from regrad_vllm.serve.engine_flags import EXTENSION_CLASS, check_engine_settings, lora_rank
from regrad_vllm.serve.settings import SettingsError


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU vLLM may compile")
@pytest.mark.filterwarnings("ignore")  # what vLLM warns about is vLLM's
def test_vllms_own_config_is_judged(model: Path, learner: Learner) -> None:
    """Asked to compile, vLLM must not with LoRA on a CPU. When this fails, our kernels must be made an operator."""
    arguments = EngineArgs(
        model=str(model), enable_lora=True, max_lora_rank=1, max_loras=4, max_cpu_loras=4, max_num_seqs=4,
        worker_extension_cls=EXTENSION_CLASS, max_model_len=512, compilation_config={"mode": 3},
    )  # type: ignore[arg-type]  # fmt: skip
    config = arguments.create_engine_config()
    assert config.compilation_config.mode == CompilationMode.NONE
    check_base(config, learner)
    check_engine_settings(config, learner)


def engine(learner: Learner, **changed: object) -> SimpleNamespace:
    lora = LoRAConfig(max_loras=4, max_cpu_loras=4)
    parts = {
        "lora_config": lora,
        "parallel_config": SimpleNamespace(worker_extension_cls=EXTENSION_CLASS, use_ubatching=False),
        "cache_config": SimpleNamespace(kv_sharing_fast_prefill=False),
        "compilation_config": SimpleNamespace(mode=CompilationMode.NONE),
        "model_config": SimpleNamespace(enable_sleep_mode=False),
        "device_config": SimpleNamespace(device_type="cpu"),
        "kv_transfer_config": None,
    }
    return SimpleNamespace(**{**parts, **changed})


def test_an_engine_that_fits_the_learner_is_accepted(learner: Learner) -> None:
    check_engine_settings(engine(learner), learner)


@pytest.mark.parametrize(
    ("connector", "module", "children", "is_accepted"),
    [
        (None, None, [], True),
        ("OffloadingConnector", None, [], True),
        ("SimpleCPUOffloadConnector", None, [], True),
        ("MultiConnector", None, ["OffloadingConnector", "MooncakeStoreConnector"], True),
        ("MultiConnector", None, ["OffloadingConnector", "LMCacheConnectorV1"], False),
        ("LMCacheConnectorV1", None, [], False),
        ("ExampleConnector", None, [], False),
        ("OffloadingConnector", "somebodys.package", [], False),
    ],
)
def test_kv_of_other_documents_is_never_taken(
    learner: Learner, connector: str | None, module: str | None, children: list[str], is_accepted: bool
) -> None:
    config = KVTransferConfig(
        kv_connector=connector, kv_connector_module_path=module, kv_role="kv_both",
        kv_connector_extra_config={"connectors": [{"kv_connector": child} for child in children]},
    )  # fmt: skip
    if is_accepted:
        check_engine_settings(engine(learner, kv_transfer_config=config), learner)
        return
    with pytest.raises(SettingsError, match="--kv-transfer-config must name OffloadingConnector, .* got .* its tokens"):
        check_engine_settings(engine(learner, kv_transfer_config=config), learner)


@pytest.mark.parametrize(
    ("changed", "flag"),
    [
        ({"lora_config": None}, "--enable-lora"),
        ({"model_config": SimpleNamespace(enable_sleep_mode=True)}, "--enable-sleep-mode must be off"),
        ({"lora_config": LoRAConfig(max_loras=4, specialize_active_lora=True)}, "--specialize-active-lora must be off"),
        ({"parallel_config": SimpleNamespace(worker_extension_cls="", use_ubatching=False)}, "--worker-extension-cls"),
        (
            {"parallel_config": SimpleNamespace(worker_extension_cls="", use_ubatching=True)},
            "--ubatch-size must be off",
        ),
        ({"cache_config": SimpleNamespace(kv_sharing_fast_prefill=True)}, "--kv-sharing-fast-prefill must be off"),
        ({"lora_config": LoRAConfig(max_loras=4, enable_tower_connector_lora=True)}, "--enable-tower-connector-lora"),
        ({"lora_config": LoRAConfig(max_loras=4, fully_sharded_loras=True)}, "--fully-sharded-loras"),
        ({"compilation_config": SimpleNamespace(mode=CompilationMode.VLLM_COMPILE)}, "VLLM_COMPILE; set --enforce"),
    ],
)
def test_an_engine_that_does_not_fit_is_told_which_flag_to_set(
    learner: Learner, changed: dict[str, object], flag: str
) -> None:
    with pytest.raises(SettingsError, match=flag):
        check_engine_settings(engine(learner, **changed), learner)


def test_a_rank_between_vllms_is_rounded_up() -> None:
    assert [lora_rank(rank) for rank in (1, 2, 12, 16, 300, 512)] == [1, 8, 16, 16, 320, 512]
    with pytest.raises(SettingsError, match="an adapter's rank must be at most 512, which is vLLM's limit, got 513"):
        lora_rank(513)
