"""data/fable_grammar.py: its probabilities, the variety of its texts, and its instructions."""

import collections
import math
import re

import pytest

from data import fable_grammar as grammar


@pytest.fixture(scope="module")
def fables():
    return [grammar.tell(f"test/{i}") for i in range(3000)]


def test_every_fable_has_one_derivation(fables):
    """Only then are a fable's bits exactly -log2 of its probability, and the entropy floor is exact."""
    for text, slots in fables[:1500]:
        ((bits, read),) = grammar.derivations(text)
        assert read == slots
        assert bits > math.log2(1e12)  # so there are far more than 10^12 distinct fables


def test_probabilities_sum_to_one(monkeypatch):
    """All texts of a small grammar are listed. It has choices, an optional word, slots of one pool and an article."""
    monkeypatch.setattr(grammar, "POOLS", {"name": ["Ann", "Bob", "Cy"], "he": ["Bob", "Cy"], "toy": ["owl", "top"]})
    rules = {
        "fable": ["{hero} [sees|likes|finds] {friend}[ again|] with {a toy}, {end}"],
        "end": ["he {he}.", "{Toy}!"],
    }
    monkeypatch.setattr(grammar, "RULES", {name: [grammar.parse(t) for t in texts] for name, texts in rules.items()})
    told = collections.Counter(grammar.tell(i)[0] for i in range(20_000))
    assert len(told) == 3 * 3 * 2 * 2 * 2 * 2
    probability = {}
    for text in told:
        ((bits, _),) = grammar.derivations(text)
        probability[text] = 2**-bits
    assert sum(probability.values()) == pytest.approx(1)
    for text, count in told.items():
        assert count / 20_000 == pytest.approx(probability[text], rel=0.35)
    assert grammar.derivations("Ann sees Ann with a top, Top!") == []
    assert len(grammar.derivations("Ann sees Bob with an owl, Owl!")) == 1


def test_ambiguity_is_found(monkeypatch):
    monkeypatch.setattr(grammar, "RULES", {"fable": [grammar.parse("a[ b|][ b|] c")]})
    assert len(grammar.derivations("a b c")) == 2


def test_fables_are_long_enough_and_vary(fables):
    lengths = [len(text.split()) for text, _ in fables]
    assert 80 <= min(lengths) and max(lengths) <= 200
    words = {word for text, _ in fables for word in re.findall(r"[a-z']+", text.lower())}
    assert 1000 <= len(words) <= 1500
    assert len(grammar.PLOTS) >= 30
    assert {slots["plot"] for _, slots in fables} == set(grammar.PLOTS)
    assert len({text for text, _ in fables}) == len(fables)


def test_fables_have_no_typographical_mistakes(fables):
    for text, _ in fables:
        assert not re.search(r"  | [.,!?;]|\s$|^\s|[\[\]{}|]|\" (?=[a-z]+ [A-Z])\s", text), text
        assert not re.search(r"(^|[.!?] )[a-z]", text.replace('!" ', "").replace('?" ', "")), text
        assert not re.search(r"\ba [aeiou]|\ban (?!hour|honest)[^aeiou]", text), text


def test_a_fable_is_a_function_of_its_seed_and_keeps_given_slots():
    assert grammar.tell(5) == grammar.tell(5) != grammar.tell(6)
    text, slots = grammar.tell(5, hero="Pim", kind="fox", plot="lost toy", toy="kite")
    assert "Pim" in text and "fox" in text and "kite" in text and slots["plot"] == "lost toy"


def test_a_fable_names_its_two_characters_and_no_other(fables):
    names = set(grammar.POOLS["name"])
    for text, slots in fables:
        assert {w for w in re.findall(r"[A-Z][a-z]+", text) if w in names} == {slots["hero"], slots["friend"]}, text


def test_instructions_are_answered_right_and_held_out_pairs_are_held_out():
    assert grammar.TASKS == ["tell", "rewrite", "friend", "kind", "home", "lesson"]
    seen = [grammar.conversation(i, task) for i in range(100) for task in grammar.TASKS]
    held_out = [grammar.conversation(i, task, held_out=True) for i in range(20) for task in grammar.TASKS]
    for turns, held in [(turns, False) for turns in seen] + [(turns, True) for turns in held_out]:
        first, *others = turns
        ((_, slots),) = grammar.derivations(first["input"] or first["output"])
        assert grammar.is_held_out(slots["kind"], slots["plot"]) == held
        for turn in turns:
            assert grammar.follows(turn, turn["output"]) and not grammar.follows(turn, "I do not know.")
        for turn in others:  # about the fable of the first turn, which is not repeated
            assert not turn["input"] and turn["task"] in ("friend", "kind", "home", "lesson")
        if first["task"] == "rewrite":
            ((_, retold),) = grammar.derivations(first["output"])
            changed = {slot for slot in slots if slots[slot] != retold.get(slot, slots[slot])}
            assert changed == {"kind"} and not grammar.follows(first, first["input"])
        assert (
            len(turns) == 1 if first["task"] == "rewrite" else len({turn["task"] for turn in turns}) == len(turns) > 3
        )


@pytest.mark.parametrize("count", [1000, pytest.param(6000, marks=pytest.mark.slow)])
def test_no_fable_of_a_held_out_pair_is_trained_on(count):
    """This reads every text in the recipe's training conversations. Of 6,000 conversations, 134 once had a rewrite
    with a held-out pair."""
    pairs = {held: set() for held in (False, True)}
    for held in (False, True):
        for messages in grammar.records(1337, count // (1 + 4 * held), held_out=held):
            for text in {m[key] for m in messages for key in ("content", "input") if len(m.get(key, "")) > 300}:
                ((_, slots),) = grammar.derivations(text)
                pairs[held].add((slots["kind"], slots["plot"]))
    assert not any(grammar.is_held_out(*pair) for pair in pairs[False])
    assert all(grammar.is_held_out(*pair) for pair in pairs[True])
    assert len(pairs[False]) > 500 and len(pairs[True]) > 80
