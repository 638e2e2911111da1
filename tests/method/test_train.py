"""Meta-training end to end on a tiny model with the default model's tokenizer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from regrad_vllm.base_model import build_layout, load_base_model
from regrad_vllm.default_model import ensure_default_model
from regrad_vllm.encode import gradient_encoder
from regrad_vllm.encode.adapted_model import AdaptedModel, TokenBatch
from regrad_vllm.encode.gradient_encoder import GradientEncoder, plan_passes
from regrad_vllm.learn.continual import pretrain
from regrad_vllm.learn.material import load_data
from regrad_vllm.learn.state import MetaState
from regrad_vllm.learn.train import JsonLog, train
from regrad_vllm.learn.train_config import ConfigError, TrainConfig
from regrad_vllm.learner import Learner, LearnerError
from tests.method.conftest import tiny_model

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    default = ensure_default_model()
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model("Llama", vocab_size=49152).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        (folder / name).write_bytes((default / name).read_bytes())
    return folder


def config(output: Path, num_steps: int) -> TrainConfig:
    return TrainConfig(
        base_model="",
        output=str(output),
        first_layer=2,
        rank=4,
        lora_alpha=8,
        num_steps=num_steps,
        tokens_per_step=200,
        max_tasks=3,
        questions_per_task=2,
        num_synthetic=50,
        compute_dtype="float32",
        validate_every=4,
        validation_batches=1,
        neighbour_share=0.0,  # what it does has tests of its own
        checkpoint_every=2,
        learning_rate=3e-3,
        seed=5,
    )


def test_training_lowers_the_loss_and_a_resumed_run_ends_where_an_unbroken_one_does(
    tmp_path: Path, model_folder: Path
) -> None:
    everything = {"neighbour_share": 0.5, "score_temperature_init": 0.1, "token_weights": True, "length_exponent": 0.5}
    whole = train(replace(config(tmp_path / "whole", 6), **everything), model_folder=model_folder)
    short = replace(config(tmp_path / "parts", 6), **everything)
    with pytest.MonkeyPatch.context() as patch:
        # The machine goes away in step 5: after the checkpoint at 4, before the next.
        import regrad_vllm.learn.train as module

        real, calls = module.meta_loss, []

        def breaks(*args: object) -> object:
            calls.append(1)
            if len(calls) == 6:
                raise KeyboardInterrupt
            return real(*args)  # type: ignore[arg-type]

        patch.setattr(module, "meta_loss", breaks)
        with pytest.raises(KeyboardInterrupt):
            train(short, model_folder=model_folder)
    with pytest.raises(ConfigError, match="--resume"):
        train(short, model_folder=model_folder)
    with pytest.raises(ConfigError, match="must be of this config"):
        train(replace(short, num_steps=7), model_folder=model_folder, resume=True)
    with pytest.raises(ConfigError, match="data and start that it was begun with"):
        train(replace(short, start=str(whole)), model_folder=model_folder, resume=True)
    parts = train(short, model_folder=model_folder, resume=True)
    logged = [
        json.loads(line)["step"] for line in Path(f"{parts}.run/log.jsonl").read_text().splitlines() if "loss" in line
    ]
    assert logged == [1, 2, 3, 4, 5, 6]
    one, two = Learner.load(whole), Learner.load(parts)
    assert np.allclose(one.phi, two.phi, atol=1e-6) and np.allclose(one.step_sizes, two.step_sizes, atol=1e-6)
    assert one.token_head is not None and np.allclose(one.token_head, two.token_head, atol=1e-6)
    assert one.token_head.any(), "it was learnt"
    assert one.config.score_temperature == pytest.approx(two.config.score_temperature, rel=1e-5)
    assert one.config.score_temperature != pytest.approx(0.1, rel=1e-4), "it was learnt"
    steps = [json.loads(line) for line in Path(f"{whole}.run/log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in steps if "loss" in entry]
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert one.config.training["num_steps"] == 6


def test_a_run_whose_time_is_over_leaves_a_checkpoint_and_goes_on_from_it(tmp_path: Path, model_folder: Path) -> None:
    settings = replace(config(tmp_path / "slices", 3), checkpoint_every=50)
    slices = 1
    while train(settings, model_folder=model_folder, resume=True, minutes=0) is None:
        slices += 1
    assert slices == 3, "at least one step a slice, and no slice after the last step"
    assert Learner.load(settings.output).config.training["num_steps"] == 3
    assert "<svg" in (tmp_path / "slices" / "training.svg").read_text("utf-8")


def test_a_run_may_start_from_a_learner_of_lower_rank_which_stays_the_same_function(
    tmp_path: Path, model_folder: Path
) -> None:
    first = config(tmp_path / "first", 2)
    train(first, model_folder=model_folder)
    start = Learner.load(first.output)
    larger = replace(config(tmp_path / "larger", 1), rank=6, lora_alpha=6.0, start=first.output)
    base, _ = load_base_model(model_folder, dtype=torch.float32)
    layout = build_layout(base, rank=6, layers=range(2, 4), projections=larger.projections)
    state = MetaState(larger, layout, 32, torch.device("cpu"))
    state.start_from(start)
    batch = TokenBatch.pad([(list(range(5, 25)), 1)])
    finals = []
    for chosen, scaling, flat in ((start.layout, start.scaling, torch.tensor(start.phi)), (layout, 1.0, state.phi)):
        model = AdaptedModel(base, chosen, scaling)
        finals.append(model.upper(model.lower(batch), model.split(flat[None]), batch))
    assert torch.allclose(*finals, atol=1e-5)
    train(larger, model_folder=model_folder)
    assert Learner.load(larger.output).config.training["start"]["fingerprint"] == start.fingerprint
    with pytest.raises(ConfigError, match="at most rank 2"):
        train(replace(config(tmp_path / "lower", 1), rank=2, start=first.output), model_folder=model_folder)
    weighted = replace(start, config=replace(start.config, score_temperature=0.1))
    with pytest.raises(ConfigError, match="score_temperature_init must be above 0"):
        state.start_from(weighted)


def test_a_run_may_take_the_phi_of_a_reader_read_cues_without_gradients_and_imitate_a_teacher(
    tmp_path: Path, model_folder: Path
) -> None:
    first = config(tmp_path / "first", 2)
    train(first, model_folder=model_folder)
    reader = replace(config(tmp_path / "reader", 3), gamma=0.0, step_size_kind="fix", icl_share=1.0, seed=6)
    train(reader, model_folder=model_folder)
    settings = replace(
        config(tmp_path / "taught", 1), start=first.output, start_phi=reader.output, teacher=reader.output,
        icl_share=0.0, cue_share=1.0, gradient_dropout=1.0,
    )  # fmt: skip
    train(settings, model_folder=model_folder)
    started, read, taught = (Learner.load(entry.output) for entry in (first, reader, settings))
    assert np.array_equal(started.step_sizes, taught.step_sizes), "no gradient, no step"
    near, far = (np.abs(taught.phi - other.phi).max() for other in (read, started))
    assert 0 < near <= 1.01 * settings.learning_rate < far
    assert {key: taught.config.training[key]["fingerprint"] for key in ("start", "start_phi", "teacher")} == {
        "start": started.fingerprint, "start_phi": read.fingerprint, "teacher": read.fingerprint
    }  # fmt: skip
    line = json.loads(Path(f"{settings.output}.run/log.jsonl").read_text().splitlines()[0])
    assert line["text"] == "cue" and line["gradients"] is False
    train(replace(settings, output=str(tmp_path / "alone"), teacher=""), model_folder=model_folder)
    alone = json.loads(Path(f"{tmp_path / 'alone'}.run/log.jsonl").read_text().splitlines()[0])
    assert line["loss"] > alone["loss"] + 1e-3, "the teacher's part"
    other = replace(config(tmp_path / "other", 1), rank=5, teacher=reader.output)
    with pytest.raises(ConfigError, match="teacher must have"):
        train(other, model_folder=model_folder)


def test_training_documents_that_stand_in_evaluation_data_are_left_out_and_named(
    tmp_path: Path, model_folder: Path
) -> None:
    shared = "The old mill at Vasterholm was built by the brothers Kreel in the year 1652 and still grinds rye today."
    texts = {"train": [shared, *(f"Number {n} is the house of {n * n} windows." for n in range(9))], "test": [shared]}
    for split, found in texts.items():
        documents = [{"id": f"{split}-{n}", "text": text, "set": "houses"} for n, text in enumerate(found)]
        questions = [
            {"id": f"{split}-q{n}", "question": f"{split} {n}?", "answers": ["rye"], "documents": [f"{split}-{n}"],
             "set": "houses"} for n in range(len(found))
        ]  # fmt: skip
        for name, lines in (("documents", documents), ("questions", questions)):
            (tmp_path / f"{split}.{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = replace(config(tmp_path / "out", 1), data_folder=str(tmp_path), sets={"houses": 1.0})
    assert len(load_data(settings).train.documents) == 9
    train(settings, model_folder=model_folder)
    training = Learner.load(settings.output).config.training
    assert training["left_out"] == ["train-0"]
    files = {f"{split}.{name}.jsonl" for split in ("train", "test") for name in ("documents", "questions")}
    assert set(training["data"]) == files, "what is left out depends on the test split"


def test_the_trained_learner_encodes_documents_and_says_what_it_cut(tmp_path: Path, model_folder: Path) -> None:
    settings = replace(config(tmp_path / "learner", 1), max_document_tokens=16)
    folder = train(settings, model_folder=model_folder)
    encoder = GradientEncoder.load(model_folder, folder, dtype=torch.float32)
    short, long = ("", "A short text."), ("Title", "many words " * 30)
    results = encoder.encode([long, short, long])
    assert [entry.truncated for entry in results] == [True, False, True]
    assert [entry.num_tokens for entry in results][::2] == [16, 16] and results[1].num_tokens < 16
    (alone,) = encoder.encode([short])
    error = np.linalg.norm(alone.values - results[1].values) / np.linalg.norm(alone.values)
    assert error <= 1e-5
    assert np.array_equal(results[0].values, results[2].values)
    assert encoder.spec.num_values == results[0].values.shape[0]


def test_documents_are_encoded_in_the_faster_type(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = train(config(tmp_path / "learner", 1), model_folder=model_folder)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(gradient_encoder, "fast_dtype", lambda _device, dtype=dtype: dtype)
        (encoded,) = GradientEncoder.load(model_folder, folder).encode([("Title", "many words " * 8)])
        found.append(encoded.values)
    exact, rounded = found
    cosine = exact @ rounded / np.linalg.norm(exact) / np.linalg.norm(rounded)
    assert 0.99 < cosine < 1 - 1e-6


def test_a_learner_is_refused_for_another_base_model(tmp_path: Path, model_folder: Path) -> None:
    folder = train(config(tmp_path / "learner", 1), model_folder=model_folder)
    other = tmp_path / "other"
    tiny_model("Llama", vocab_size=49152, seed=1).save_pretrained(other)
    for name in TOKENIZER_FILES:
        (other / name).write_bytes((model_folder / name).read_bytes())
    with pytest.raises(LearnerError, match="was made for the base model"):
        GradientEncoder.load(other, folder)


def test_passes_hold_every_document_once_and_stay_within_their_bounds() -> None:
    lengths = [500, 3, 3000, 40, 41, 2, 512] + [7] * 70
    passes = list(plan_passes(lengths))
    assert sorted(index for chosen in passes for index in chosen) == list(range(len(lengths)))
    assert all(len(chosen) == 1 or len(chosen) * max(lengths[i] for i in chosen) <= 2048 for chosen in passes)
    assert max(map(len, passes)) <= 32


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("rnak = 4", "unknown key 'rnak'"),
        ("rank = 0", "rank must be at least 1"),
        ("learning_rate = nan", "learning_rate"),
        ('step_size_kind = "x"', "step_size_kind"),
        ("sets = {squad = 1.0}", "data_folder"),
        ("gamma = nan", "gamma must lie in"),
        ("top_k_weights = [0.0, 0.0]", "top_k_weights must be numbers"),
        ('prompts = {sytem = "x"}', "sytem"),
        ("icl_share = 0.6\ncue_share = 0.5", "icl_share . cue_share must be at most 1"),
        ('data_folder = "d"', "sets must name the sets of .*/d to train on"),
    ],
)
def test_a_bad_config_is_an_error_that_names_the_key(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(f'base_model = "default"\noutput = "o"\nfirst_layer = 1\n{line}\n')
    with pytest.raises(ConfigError, match=message):
        TrainConfig.load(path)


def test_a_config_without_a_required_key_says_which(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('base_model = "default"\noutput = "o"\n')
    with pytest.raises(ConfigError, match=r"c\.toml: first_layer must be given"):
        TrainConfig.load(path)


def test_a_log_whose_last_line_was_cut_off_by_a_kill_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.9}\n{"step": 3, "lo')
    JsonLog(path, 1)(step=2, loss=1.5)
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [2.0, 1.5]


def test_continual_pretraining_reads_the_corpus_batch_by_batch(
    tmp_path: Path, model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = config(tmp_path / "start", 1)
    train(settings, model_folder=model_folder)
    learner = Learner.load(settings.output)
    documents = [(f"House {number}", f"The lamp of house {number} is kept by Ada.") for number in range(10)]
    with caplog.at_level("INFO"):
        adapter = pretrain(learner, model_folder, documents, learning_rate=1e-2, epochs=8, batch_size=4)
    assert adapter.shape == learner.phi.shape and adapter.dtype == np.float32
    (said,) = [record.args for record in caplog.records if record.name == "regrad_vllm.learn.continual"]
    assert isinstance(said, tuple)
    steps, first, last = said
    assert steps == 8 * 3 and float(str(last)) < float(str(first)) - 0.5
