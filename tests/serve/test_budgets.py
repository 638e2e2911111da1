"""The sizes of arena and workers, compared with what is free."""

from __future__ import annotations

from pathlib import Path

import pytest

from regrad_vllm.serve import budgets, launch
from regrad_vllm.serve.arena.folders import free_bytes
from regrad_vllm.serve.budgets import SIZES, check_room, fitted, room
from regrad_vllm.serve.settings import Settings, SettingsError

DOCKERS = 64 * 2**20
DEFAULT = 256 * 2**20


def test_sizes_that_nobody_gave_shrink_to_a_third_of_what_is_free(caplog: pytest.LogCaptureFixture) -> None:
    settings = Settings(learner=Path("/l"))
    both = fitted(settings, SIZES, DOCKERS, 1, 1)
    assert both.arena_bytes == both.worker_bytes == DOCKERS // 3
    assert f"--regrad-worker-bytes shrinks to {DOCKERS // 3}, a third of what is free in" in caplog.text
    one = fitted(settings, ["worker_bytes"], DOCKERS, 1, 1)
    assert (one.arena_bytes, one.worker_bytes) == (DEFAULT, DOCKERS // 3)
    assert fitted(settings, SIZES, 3 * DEFAULT, 1, 1) == fitted(settings, [], 0, 1, 1) == settings
    several = fitted(settings, SIZES, DOCKERS, 2, 4)
    assert (several.arena_bytes, several.worker_bytes) == (DOCKERS // 6, DOCKERS // 12)
    check_room(several, DOCKERS, 2, 4)


def test_the_sizes_of_all_servers_and_ranks_must_fit(tmp_path: Path) -> None:
    settings = Settings(learner=Path("/l"), arena_dir=tmp_path, arena_bytes=100, worker_bytes=100)
    check_room(settings, 399, 1, 1)
    for servers, ranks in (1, 3), (3, 1):
        rule = (
            rf"--regrad-arena-bytes for {servers} API servers and --regrad-worker-bytes for {ranks} data parallel "
            rf"ranks must fit the 399 bytes that are free in {tmp_path}, they are 400; lower them, .* \(--shm-size"
        )
        with pytest.raises(SettingsError, match=rule):
            check_room(settings, 399, servers, ranks)


def test_the_folders_of_dead_servers_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "regrad-arena-dead").mkdir()
    (tmp_path / "regrad-arena-dead" / "record").write_bytes(b"x")
    settings = Settings(learner=Path("/l"), arena_dir=tmp_path)
    assert room(settings, sweep=False) > 0 and list(tmp_path.glob("regrad-arena-*"))
    assert room(settings) > 0 and not list(tmp_path.glob("regrad-arena-*"))


def test_a_command_that_is_only_printed_makes_no_folder_and_has_sizes_for_all_ranks(
    small_model: Path,
    learner_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(launch, "has_gpu", lambda: False)
    monkeypatch.setattr(budgets, "free_bytes", lambda root, *, sweep: free_bytes(root, sweep=sweep) and DOCKERS)
    command = [str(small_model), "--learner", str(learner_folder), "--regrad-arena-dir", str(tmp_path / "a" / "b")]
    assert launch.main([*command, "--api-server-count", "3", "-dp", "2", "--print-command"]) == 0
    printed = capsys.readouterr().out
    assert f"REGRAD_ARENA_BYTES={DOCKERS // 9} " in printed and f"REGRAD_WORKER_BYTES={DOCKERS // 6} " in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        (["--regrad-worker-bytes", str(2**50)], "--regrad-arena-bytes for 1 API servers and --regrad-worker-bytes"),
        (["--regrad-arena-dir", "/dev/null/none"], "--regrad-arena-dir must be a folder to write to"),
    ],
)
def test_a_server_that_lacks_room_does_not_start(
    flags: list[str], rule: str, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "has_gpu", lambda: False)
    with pytest.raises(SettingsError, match=rule):
        launch.main([str(small_model), "--learner", "/l", *flags, "--port", "0"])
