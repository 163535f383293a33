"""What one card's play tells of other cards: `tightfit.vgpu.card_answers`."""

from types import SimpleNamespace

from tightfit.kernels.card import Card
from tightfit.vgpu.card_answers import CardAnswers, watched

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
    assert answers.alike == [LARGER]
    assert not answers.is_chip_known
    assert properties.multi_processor_count == 28
    assert answers.alike == [LARGER]
    assert answers.is_chip_known
