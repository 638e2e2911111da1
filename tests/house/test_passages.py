"""Long texts are cut where a reader would cut them, and lose nothing."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from bank_service.values.sentences import split_sentences
from regrad_vllm.data import token_counts
from regrad_vllm.data.passages import (
    MAX_PASSAGE_TOKENS,
    OVERLAP_TOKENS,
    TARGET_TOKENS,
    Passage,
    split_markdown,
    split_plain,
    split_text,
)
from regrad_vllm.data.token_counts import count_tokens, tokenizer_of
from regrad_vllm.default_model import ensure_default_model, shipped_learner
from regrad_vllm.learner import Learner


def _prose(num_sentences: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    sentences = []
    for number in range(num_sentences):
        words = ["".join(rng.choices("adegilnorst", k=5)) for _ in range(rng.randint(6, 25))]
        sentences.append(" ".join(words).capitalize() + f" n{number}.")
    return " ".join(sentences)


def without_overlap(passages: list[Passage]) -> list[str]:
    """The words in order, where each passage repeats the end of the one before it."""
    words: list[str] = []
    for passage in passages:
        new = passage.text.split()
        repeated = next(n for n in range(min(len(new), len(words)), -1, -1) if words[len(words) - n :] == new[:n])
        words += new[repeated:]
    return words


@pytest.mark.parametrize("num_sentences", [1, 5, 9, 40, 200])
def test_no_word_is_lost_or_moved(num_sentences: int) -> None:
    text = _prose(num_sentences)
    assert without_overlap(split_plain(text)) == text.split()


def test_passages_have_about_the_target_length_and_end_with_a_sentence() -> None:
    passages = split_plain(_prose(200))
    lengths = [count_tokens(passage.text) for passage in passages]
    assert len(passages) > 10
    assert max(lengths) <= MAX_PASSAGE_TOKENS + OVERLAP_TOKENS
    assert min(lengths) >= 0.5 * TARGET_TOKENS
    assert all(passage.text.endswith(".") for passage in passages)


def test_a_passage_begins_with_the_last_sentence_of_the_one_before() -> None:
    passages = [passage.text for passage in split_plain(_prose(200))]
    repeats = 0
    for before, after in zip(passages, passages[1:], strict=False):
        first = after.split(".")[0] + "."
        if count_tokens(before.split(". ")[-1]) <= OVERLAP_TOKENS:
            assert first in before
            repeats += 1
    assert repeats > 5


def test_a_text_that_is_short_enough_stays_as_it_is() -> None:
    text = "  Two  spaces,\n\n\nand lines. "
    assert split_text("T", text) == [Passage("T", text)]
    assert len(split_text("T", _prose(40))) > 2


def test_paragraphs_stay_together_where_they_fit() -> None:
    paragraphs = [_prose(5, seed) for seed in range(6)]
    passages = split_plain("\n\n".join(paragraphs))
    joined = [passage.text for passage in passages]
    assert len(joined) > 1
    for paragraph in paragraphs:
        assert any(paragraph in text for text in joined)


def test_a_text_without_any_full_stop_is_still_cut() -> None:
    text = " ".join(["bridge"] * 1000)
    passages = split_plain(text)
    whole = 1000 * TARGET_TOKENS // count_tokens(text)
    assert [len(passage.text.split()) for passage in passages[:-1]] == [whole] * (len(passages) - 1)


def test_a_script_without_spaces_is_cut_and_loses_nothing() -> None:
    text = "".join(f"这是第{number}句话，讲的是一座不存在的桥。" for number in range(400))
    passages = split_plain(text)
    assert len(passages) > 3
    assert max(count_tokens(passage.text) for passage in passages) <= MAX_PASSAGE_TOKENS + OVERLAP_TOKENS
    spaced = [Passage("", " ".join(passage.text.replace(" ", "").replace("\n", ""))) for passage in passages]
    assert "".join(without_overlap(spaced)) == text


_TEXTS = {
    "ru": """Глава о свободе и достоинстве людей
Все люди рождаются свободными и равными в своем достоинстве и правах.
Они наделены разумом и совестью и должны поступать в отношении друг друга в духе братства.""",
    "hi": """मनुष्यों के अधिकार और स्वतन्त्रता
सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।
उन्हें बुद्धि और अन्तरात्मा की देन प्राप्त है और परस्पर उन्हें भाईचारे के भाव से बर्ताव करना चाहिए।""",
    "zh": """人的尊严和权利
人人生而自由，在尊严和权利上一律平等。
他们赋有理性和良心，并应以兄弟关系的精神相对待。""",
    "ar": """حقوق الإنسان
يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق.
وقد وهبوا عقلاً وضميرًا وعليهم أن يعامل بعضهم بعضًا بروح الإخاء.""",
    "ko": """인간의 존엄과 권리
모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.
인간은 천부적으로 이성과 양심을 부여받았으며 서로 형제애의 정신으로 행동하여야 한다.""",
}


@pytest.mark.parametrize("language", _TEXTS)
@pytest.mark.parametrize("by_tokenizer", [False, True], ids=["estimated", "counted"])
def test_no_passage_is_longer_than_the_learner_reads_in_any_script(language: str, by_tokenizer: bool) -> None:
    title, *sentences = _TEXTS[language].split("\n")
    rng = random.Random(0)
    text = " ".join(f"{number} {rng.choice(sentences)}" for number in range(150))
    exact = tokenizer_of(ensure_default_model())
    passages = split_markdown(f"# {title}\n\n## {title}\n\n{text}", exact if by_tokenizer else count_tokens)
    limit = Learner.load(shipped_learner()).config.max_document_tokens
    lengths = [exact(f"{passage.title}\n{passage.text}") for passage in passages]
    assert max(lengths) <= limit
    assert min(lengths[:-1]) >= limit / 4, "nor far shorter"
    assert without_overlap(passages) == text.split()


_NUMBERS = [random.Random(0).randrange(10**n) for n in range(1, 10)] * 30
_KINDS = {
    "numbers": " ".join(map(str, _NUMBERS)),
    "csv": "\n".join(f"{number},2024-01-{n % 28:02},{number / 7:.2f}" for n, number in enumerate(_NUMBERS)),
    "json": json.dumps([{"id": number, "name": "Orlen", "open": True, "at": None} for number in _NUMBERS]),
    "hex": random.Random(0).randbytes(500).hex(),
    "code": Path(token_counts.__file__).read_text("utf-8"),
    "prose": (Path(__file__).parents[2] / "LICENSE").read_text("utf-8"),
}


@pytest.mark.parametrize("kind", _KINDS)
def test_the_estimate_is_near_the_count_for_prose_and_not_too_low_for_numbers_and_signs(kind: str) -> None:
    ratio = tokenizer_of(ensure_default_model())(_KINDS[kind]) / count_tokens(_KINDS[kind])
    assert (0.9 if kind == "prose" else 0.6) < ratio < 1.1


def test_markdown_headings_become_titles_with_the_headings_above_them() -> None:
    text = "Before.\n\n# Guide\n\nOne.\n\n## Install\n\nTwo.\n\n```sh\n# not a heading\n```\n\n# Next\nThree."
    assert [(passage.title, passage.text) for passage in split_markdown(text)] == [
        ("", "Before."),
        ("Guide", "One."),
        ("Guide / Install", "Two.\n\n```sh\n# not a heading\n```"),
        ("Next", "Three."),
    ]


@pytest.mark.parametrize(
    "code",
    [
        "```npm install``` is one line",
        "```` \n```\n# code\n```\n````",
        "```\n~~~\n# code\n``` not the end\n  ```  ",
        "~~~ a `tick`\n# code\n~~~~",
        "- ```sh\n  # code\n  ```",
        "> ```\n> # code",
        "    ```\n    indented",
        "<!--\n# a comment\n-->",
    ],
)
def test_only_code_by_commonmarks_rules_hides_a_heading(code: str) -> None:
    assert split_markdown(f"# A\n\n{code}\n\n ## B ##\nText.\n#no heading") == [
        Passage("A", code.strip()),
        Passage("A / B", "Text.\n#no heading"),
    ]


def test_a_fence_that_is_not_closed_goes_on_to_the_end() -> None:
    assert split_markdown("# A\n```\n# code") == [Passage("A", "```\n# code")]


def test_metadata_at_the_top_of_a_file_are_no_heading() -> None:
    assert split_markdown("---\ntitle: x\n---\n# A\nText.") == [
        Passage("", "---\ntitle: x\n---"),
        Passage("A", "Text."),
    ]


def test_a_plain_text_takes_a_first_line_that_stands_alone_as_its_heading() -> None:
    assert [passage.title for passage in split_plain("The bridge of Orlen\n\nIt is built of oak.")] == [
        "The bridge of Orlen"
    ]
    assert [passage.title for passage in split_plain("It is built of oak.\n\nAnd of stone.")] == [""]
    assert [passage.title for passage in split_plain("one line\nanother line")] == [""]


@pytest.mark.parametrize(
    ("line", "is_heading"),
    [
        ("奥伦的桥", True),
        ("这是第一句话，讲的是一座不存在的桥。", False),
        ("这是第一句话讲的是一座桥" * 33 + "这里。", False),
        ("这是第一句话讲的是一座不存在的桥也讲的是河和船", True),
        ("这是第一句话讲的是一座不存在的桥也讲的是河和船的故事", False),
        ("彼は「行こう。」", False),
        ("彼は行った．", False),
        ("楽しいね～", False),
        ("यह पुल लकड़ी का बना है।", False),
        ("اين الجسر؟", False),
        ("He said “Go.”", False),
        ("x" * 121, False),
        ("The “Quilegren”", True),
    ],
)
def test_a_first_line_is_no_heading_in_any_script_if_it_is_long_or_a_sentence(line: str, is_heading: bool) -> None:
    passages = split_plain(f"{line}\n\nBody.")
    assert passages[0].title == (line if is_heading else "")
    assert passages[0].text.startswith("Body." if is_heading else line[:10])


def test_headings_that_are_too_long_for_a_title_are_text_or_lose_the_outer_ones() -> None:
    long, middle = "桥" * 400, "桥" * 200
    assert split_markdown(f"# {long}\n\nText.")[0].title == ""
    assert split_markdown(f"# {long}\n\nText.")[0].text.startswith("# 桥")
    assert split_markdown(f"# {middle}\n## {middle}\nText.") == [Passage(middle, "Text.")]


def test_a_heading_that_is_too_long_ends_the_section_before_it() -> None:
    long = "奥" * 342
    passages = split_markdown(f"# A\n\n## B\n\nOne.\n\n## {long}\n\nTwo.\n\n### C\n\nThree.")
    assert list(dict.fromkeys(passage.title for passage in passages)) == ["A / B", "A", "A / C"]
    assert [passage.text for passage in passages if passage.title != "A"] == ["One.", "Three."]


def test_sentences_end_in_other_scripts_too() -> None:
    text = "他说：“走吧。”然后走了。 यह पुल है। वह नदी है। هل هذا جسر؟ نعم. Да.» Нет."
    assert list(split_sentences(text)) == [
        "他说：“走吧。”",
        "然后走了。",
        "यह पुल है।",
        "वह नदी है।",
        "هل هذا جسر؟",
        "نعم.",
        "Да.»",
        "Нет.",
    ]
    assert list(split_sentences("約３．１４だ．次は5～10分。楽しいね～行こう")) == [
        "約３．１４だ．",
        "次は5～10分。",
        "楽しいね～",
        "行こう",
    ]


@pytest.mark.parametrize("end", ["\r\n", "\r", "\v"])
def test_other_line_ends_separate_paragraphs_and_sections_too(end: str) -> None:
    plain = "Heading\n\nBody one.\n\nBody two.".replace("\n", end)
    assert split_plain(plain) == [Passage("Heading", "Body one.\n\nBody two.")]
    assert split_markdown("# A\n\nOne.\n# B\nTwo.".replace("\n", end)) == [Passage("A", "One."), Passage("B", "Two.")]


def test_a_form_feed_is_white_space() -> None:
    pages = "\fThe bridge\n\nIt is built\n\fof oak. [Page 1]\n\f\nRFC 9\fends."
    assert split_plain(pages) == [Passage("The bridge", "It is built\n of oak. [Page 1]\n\nRFC 9 ends.")]
    assert split_markdown("# A\n\f\nOne.\n\f# B\n\nTwo.") == [Passage("A", "One."), Passage("B", "Two.")]


def test_an_empty_text_has_no_passage() -> None:
    assert split_plain(" \n\n ") == []
    assert split_markdown("# Only a heading\n") == []
