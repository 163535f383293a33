"""What one card's play tells of other cards: `tightfit.vgpu.card_answers` and `card_properties`."""

import copy
import operator
import pickle
from types import SimpleNamespace

from tightfit.kernels.card import Card
from tightfit.vgpu.card_answers import CardAnswers
from tightfit.vgpu.card_properties import capability_of, watched

TURING = Card(capability=(7, 5), sm_count=40)
AMPERE = Card(capability=(8, 6), sm_count=28)
LARGER = Card(capability=(8, 6), sm_count=82)
ADA = Card(capability=(8, 9), sm_count=128)


def among(*others: Card) -> CardAnswers:
    answers = CardAnswers(AMPERE)
    answers.alike = list(others)
    return answers


def test_a_card_that_answers_otherwise_is_no_longer_alike() -> None:
    answers = among(TURING, LARGER, ADA)
    assert answers.ask(lambda card: card.capability >= (8, 0)) is True
    assert answers.alike == [LARGER, ADA]
    assert answers.ask(lambda card: card.sm_count) == 28
    assert answers.alike == []


def test_a_card_on_which_the_program_would_fail_is_not_alike() -> None:
    def kernel(card: Card) -> str:
        if card.capability < (8, 0):
            raise RuntimeError("No available kernel. Aborting execution.")
        return "flash"

    answers = among(TURING, ADA)
    assert answers.ask(kernel) == "flash"
    assert answers.alike == [ADA]


def test_a_question_that_was_asked_before_is_not_put_to_the_others_again() -> None:
    answers, asked = among(ADA), []

    def question(card: Card) -> None:
        asked.append(card)

    for _ in range(3):
        answers.ask(question, key="softmax of (8, 8)")
    assert asked == [AMPERE, ADA, AMPERE, AMPERE]


def test_readings_of_the_properties_tell_cards_apart() -> None:
    answers = among(TURING, LARGER, ADA)
    properties = watched(SimpleNamespace(name="a card", total_memory=1, major=8, multi_processor_count=28), answers)
    assert (properties.name, properties.total_memory) == ("a card", 1)
    assert answers.alike == [TURING, LARGER, ADA]
    assert properties.major == 8
    assert answers.alike == [LARGER, ADA]
    assert not answers.is_chip_known
    assert properties.multi_processor_count == 28
    assert answers.alike == [LARGER]
    assert answers.is_chip_known


def of_ampere(*others: Card) -> tuple[CardAnswers, SimpleNamespace]:
    answers = among(*others)
    return answers, watched(SimpleNamespace(major=8, minor=6), answers)


def test_a_comparison_parts_only_the_cards_for_which_it_comes_out_otherwise() -> None:
    answers, properties = of_ampere(TURING, LARGER, ADA)
    assert properties.major >= 7
    assert operator.le(7, properties.major)
    assert properties.minor > 0.5
    assert answers.alike == [TURING, LARGER, ADA]
    assert properties.major > 7
    assert answers.alike == [LARGER, ADA]
    assert answers.parted == [[TURING]]
    assert properties.minor != 9
    assert answers.alike == [LARGER]


def test_any_other_use_of_a_number_asks_for_the_number() -> None:
    uses = (
        lambda number: f"sm_{number}",
        lambda number: f"{number:2d}",
        lambda number: str(number),
        lambda number: repr(number),
        lambda number: {8: "Ampere"}.get(number),
        lambda number: number * 10,
        lambda number: 10 + number,
        lambda number: int(number),
        lambda number: bool(number),
        lambda number: copy.deepcopy(number),
        lambda number: pickle.loads(pickle.dumps(number)),
    )
    for place, use in enumerate(uses):
        answers, properties = of_ampere(TURING, LARGER, ADA)
        assert use(properties.major) == use(8), place
        assert answers.alike == [LARGER, ADA], place


def test_a_capability_is_compared_as_a_whole() -> None:
    answers, properties = of_ampere(TURING, LARGER, ADA)
    capability = capability_of(properties, answers)
    assert capability >= (7, 5)
    assert operator.lt((7, 0), capability)
    assert capability != "8.6"
    assert answers.alike == [TURING, LARGER, ADA]
    major, _ = capability
    assert major >= 8
    assert capability[0] >= 8
    assert answers.alike == [LARGER, ADA]
    assert capability in {(8, 6), (8, 0)}
    assert answers.alike == [LARGER]
    assert capability == (8, 6)
    assert f"{capability}" == "(8, 6)"
    assert type(copy.deepcopy(capability)) is tuple


def test_without_other_cards_the_numbers_are_plain() -> None:
    answers, properties = of_ampere()
    assert type(properties.major) is int
    assert type(capability_of(properties, answers)) is tuple
