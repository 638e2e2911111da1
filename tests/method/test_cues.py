from __future__ import annotations

import random

from bank_service.values.embedder import default_embedder
from regrad_vllm.learn.cues import Cues, sentences

MILL = ("The mill", "The mill was built in 1652 by two brothers. It grinds rye.\n\nIts wheel was made of larch wood.")
SHOP = ("The shop", "The shop opens at nine in the morning. On Sundays it is closed.")


def test_a_cue_is_the_sentence_that_the_question_is_about_with_its_title() -> None:
    cues = Cues(default_embedder())
    assert cues.nearest("When was the mill built?", [MILL, SHOP]) == (("The mill", MILL[1].split(" It")[0]),)
    wheel = ("The mill", "Its wheel was made of larch wood.")
    assert cues.nearest("What wood is the wheel of?", [MILL, SHOP]) == (wheel,)
    assert cues.nearest("At what time does the shop open?", [MILL, SHOP])[0][0] == "The shop"


def test_a_cue_has_the_nearest_sentences_of_one_document_or_of_several() -> None:
    of_one = "What wood is the wheel of the mill, and when was it built?"
    of_both = "What wood is it, and when does it open?"
    embedder = default_embedder()
    (one,) = Cues(embedder).nearest(of_one, [SHOP, MILL])
    two = Cues(embedder, 2).nearest(of_one, [SHOP, MILL])
    assert two[0] == one and [title for title, _ in two] == ["The mill"] * 2
    assert {title for title, _ in Cues(embedder, 2).nearest(of_both, [SHOP, MILL])} == {"The mill", "The shop"}
    assert len(Cues(embedder, 9).nearest(of_one, [SHOP, MILL])) == 5, "all there are"


def test_any_sentence_of_any_document_may_be_the_cue_and_a_text_without_an_end_is_one_sentence() -> None:
    drawn = {Cues.any([MILL, SHOP], random.Random(seed)) for seed in range(100)}
    assert drawn == {*sentences(*MILL), *sentences(*SHOP)} and len(drawn) == 5
    assert sentences("T", "no end") == [("T", "no end")] and sentences("T", " ") == [("T", " ")]
