"""data/fable_grammar.py: that its probabilities are right, and that it tells what the issue of the corpus asks."""

import collections
import math
import re

import pytest

from data import fable_grammar as grammar


@pytest.fixture(scope="module")
def fables():
    return [grammar.tell(f"test/{i}") for i in range(3000)]


def test_every_fable_has_one_derivation(fables):
    """Only then are a fable's bits exactly -log2 of its probability, and the entropy floor is one."""
    for text, slots in fables[:1500]:
        ((bits, read),) = grammar.derivations(text)
        assert read == slots
        assert bits > math.log2(1e12)  # hence far more than 10^12 distinct fables


def test_probabilities_sum_to_one(monkeypatch):
    """A grammar small enough to list: choices, an optional word, slots of one pool, an article."""
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


def test_length_vocabulary_and_variety(fables):
    lengths = [len(text.split()) for text, _ in fables]
    assert 80 <= min(lengths) and max(lengths) <= 200
    words = {word for text, _ in fables for word in re.findall(r"[a-z']+", text.lower())}
    assert 1000 <= len(words) <= 1500
    assert len(grammar.PLOTS) >= 30
    assert {slots["plot"] for _, slots in fables} == set(grammar.PLOTS)
    assert len({text for text, _ in fables}) == len(fables)


def test_typography(fables):
    for text, _ in fables:
        assert not re.search(r"  | [.,!?;]|\s$|^\s|[\[\]{}|]|\" (?=[a-z]+ [A-Z])\s", text), text
        assert not re.search(r"(^|[.!?] )[a-z]", text.replace('!" ', "").replace('?" ', "")), text
        assert not re.search(r"\ba [aeiou]|\ban (?!hour|honest)[^aeiou]", text), text


def test_telling_is_a_function_of_the_seed_and_keeps_given_slots():
    assert grammar.tell(5) == grammar.tell(5) != grammar.tell(6)
    text, slots = grammar.tell(5, hero="Pim", kind="fox", plot="lost toy", toy="kite")
    assert "Pim" in text and "fox" in text and "kite" in text and slots["plot"] == "lost toy"


def test_slots_stay_consistent(fables):
    """The hero's kind and both names in a fable are the ones bound, and no other name occurs."""
    names = set(grammar.POOLS["name"])
    for text, slots in fables:
        assert {w for w in re.findall(r"[A-Z][a-z]+", text) if w in names} == {slots["hero"], slots["friend"]}, text
