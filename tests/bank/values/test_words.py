"""The words of documents and queries."""

from __future__ import annotations

import unicodedata

import pytest

from bank_service.values.words import document_words, query_words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't_stop 2nd C++!", "don t stop 2nd c"),
        ("Renée GRÖSSE größe", "renee grosse grosse"),
        ("ｆｕｌｌ ﬁne ①", "full fine 1"),
        ("İstanbul ΣΑΣ σας", "istanbul σασ σασ"),
        ("Wort\u00adtrennung", "worttrennung"),
        ("हिन्दी में", "हिन्दी में"),
        ("مُحَمَّد", "محمد"),
        ("1️⃣ ❤️ 👩‍👧 ️", "1"),
        ("大桥。", "大 桥 大桥"),
        ("第3章", "第 3 章"),
        ("ガス・カ", "ガ ス ガス カ"),
        ("서울의 vLLM", "서 울 의 서울 울의 vllm"),
        ("กา", "ก า กา"),
        ("", ""),
        ("!? _", ""),
    ],
)
def test_each_spelling_of_a_text_has_the_same_words(text: str, words: str) -> None:
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert document_words(unicodedata.normalize(form, text)) == words, form


def test_a_query_in_a_script_without_spaces_has_pairs_or_a_lone_character() -> None:
    assert query_words("南京大桥 bridge 桥") == ["南京", "京大", "大桥", "bridge", "桥"]


@pytest.mark.parametrize("text", ["Renée", "南京大桥", "桥", "서울", "カフェ", "สวัสดี", "हिन्दी", "Größe", "3.5 GB"])
def test_a_text_has_every_word_of_a_query_for_it(text: str) -> None:
    words = document_words(f"before {text}, behind").split()
    assert query_words(text) and set(query_words(text)) <= set(words)


@pytest.mark.parametrize("marks", ["\u094d\u093c", "\u0f73"])
def test_a_letter_has_at_most_30_marks(marks: str) -> None:
    """More would take time in the square of their number."""
    words = document_words("\u0915" + (marks * 30)[:30])
    assert len(words) > 30 and document_words("\u0915" + marks * 30_000 + " end") == f"{words} end"


def test_accents_without_end_do_not_hide_the_letters_behind_them() -> None:
    assert document_words("a" + "\u0301\u0323" * 30_000 + "b \u0301c") == "ab c"
