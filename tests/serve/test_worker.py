"""The worker's side of the plugin, without an engine: what it takes for a recipe, when it is on."""

from __future__ import annotations

import pytest

from regrad_vllm.serve.recipe import Recipe, RecipeError
from regrad_vllm.serve.settings import SettingsError
from regrad_vllm.serve.worker import register


@pytest.mark.parametrize(
    "path", ["regrad:", "regrad:{", "regrad:[]", 'regrad:{"v":2}', 'regrad:{"v":1}', "/some/folder",
             'regrad:{"v":1,"arena":"","learner":"","digests":["a"],"weights":[],"gamma":1}',
             'regrad:{"v":1,"arena":"","learner":"","digests":[],"weights":[],"gamma":Infinity}'],
)  # fmt: skip
def test_a_path_that_is_no_recipe_is_refused(path: str) -> None:
    with pytest.raises(RecipeError):
        Recipe.parse(path)


def test_register_does_nothing_without_a_learner_and_refuses_a_half_enabled_plugin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("REGRAD_LEARNER", raising=False)
    register()
    monkeypatch.setenv("REGRAD_LEARNER", "/nowhere")
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    with pytest.raises(SettingsError, match="VLLM_PLUGINS must name regrad"):
        register()
