"""
The bundled corpus: a probabilistic grammar that generates short fables. The grammar itself is fable_grammar.txt.

    python data/fable_grammar.py            # prints a fable
    python data/fable_grammar.py 5          # prints the sixth fable

Every choice in the grammar is uniform, so a text's probability is known. derivations(text) parses a text and returns
every way in which the grammar could generate it, with the information in bits. The grammar is written so that there is
only one way, and prepare.py checks this for every held-out fable. So its bits are exactly -log2 p(text). The sum of the
bits of a set of fables, divided by their bytes, is the entropy floor below which no model can go.

Format of fable_grammar.txt: `= pool` lists words. `: rule` lists alternatives, each after `- `. `* plot` is a story:
its hero's action ({does} in other rules), its text, and after `>` its lessons. Inside a text, [a|b] is a choice and
{rule} is a rule. {slot} is a word that is drawn once from its pool and then stays the same. {a slot} is the word with
its article, and {A slot} or {Slot} begins with a capital letter.

    documents(seed, count), bits(text)      # the functions that prepare.py needs
    records(seed, count)                    # conversations to learn from: instructions about fables, and their answers
    follows(turn, answer)                   # whether an answer follows its instruction
"""

import math
import random
import re
import sys
import zlib
from pathlib import Path

# slot: the pool it draws from; slots of one pool never hold the same word
SLOTS = {
    "hero": "name",
    "friend": "name",
    "plot": "plot",
    "kind": "animal",
    "fkind": "animal",
    "third": "animal",
    "fourth": "animal",
    "place": "place",
    "spot": "place",
    "toy": "toy",
    "food": "food",
    "treat": "food",
    "tool": "tool",
    "color": "color",
    "hue": "color",
    "number": "number",
    "trait": "trait",
    "ftrait": "trait",
}
# a pronoun agrees with the name in a slot: word -> (slot, masculine form, feminine form); f marks the friend's pronouns
PRONOUNS = {
    prefix + he: (slot, he, she)
    for prefix, slot in (("", "hero"), ("f", "friend"))
    for he, she in (("he", "she"), ("him", "her"), ("his", "her"), ("himself", "herself"))
}


def parse(text):
    """Return a template as a tuple of nodes: strings, lists of tuples (a choice), and (modifier, name) from braces."""
    text = re.sub(r"\s*\n\s*\|\s*|\s*\|\s*\n\s*", "|", text.strip())  # a line may begin or end with a bar
    text = re.sub(r"\s*\n\s*", " ", text)
    tokens = re.findall(r"[\[\]|]|\{[^}]*\}|[^\[\]|{}]+", text)
    stack = [[[]]]  # for each open bracket, its alternatives so far
    for token in tokens:
        if token == "[":
            stack.append([[]])
        elif token == "|":
            stack[-1].append([])
        elif token == "]":
            choice = [tuple(nodes) for nodes in stack.pop()]
            stack[-1][-1].append(choice)
        elif token[0] == "{":
            stack[-1][-1].append(tuple(token[1:-1].rpartition(" ")[::2]))
        else:
            stack[-1][-1].append(token)
    ((nodes,),) = stack
    return tuple(nodes)


def read_grammar(path):
    """Return the pools {name: [words]}, the rules {name: [nodes]} and the plots {name: nodes of the hero's action}."""
    pools, rules, plots = {}, {}, {}
    for section in re.split(r"\n(?=[=:*] )", "\n" + re.sub(r"(?m)^#.*\n", "", path.read_text(encoding="utf-8"))):
        head, _, body = section.strip().partition("\n")
        mark, _, name = head.partition(" ")
        if mark == "=":
            pools[name] = [word.strip() for word in " ".join(body.split()).split(",")]
        elif mark == ":":
            rules[name] = [parse(text) for text in re.split(r"(?m)^- ", body)[1:]]
        elif mark == "*":
            does, story, lessons = re.fullmatch(r"(.*?)\n(.*)\n> (.*)", body.strip(), re.S).groups()
            plots[name] = parse(does)
            rules[name] = [parse(story)]
            pools[name] = " ".join(lessons.split()).split(" | ")
    return pools, rules, plots


POOLS, RULES, PLOTS = read_grammar(Path(__file__).with_suffix(".txt"))
POOLS["plot"] = list(PLOTS)
POOLS["name"] = POOLS["he"] + POOLS["she"]


def expand(node, slots):
    """Return a node's text. If the node is a choice, return (options, slot) instead: the chosen option fills the slot,
    or is a list of nodes to expand if slot is None."""
    if isinstance(node, list):
        return node, None
    modifier, name = node
    key = name[0].lower() + name[1:]
    if key in PRONOUNS:
        slot, he, she = PRONOUNS[key]
        word = he if slots[slot] in POOLS["he"] else she
    elif name in ("plot", "does") and "plot" in slots:
        return RULES[slots["plot"]] if name == "plot" else [PLOTS[slots["plot"]]], None
    elif key in slots:
        word = slots[key]
    elif name in RULES:
        return RULES[name], None
    else:
        key = "plot" if key == "does" else key  # the plot is drawn at its first use
        pool = slots["plot"] if key == "lesson" else SLOTS[key]
        taken = [slots.get(other) for other, its in SLOTS.items() if its == pool]
        return [word for word in POOLS[pool] if word not in taken], key
    if modifier:
        word = article(word, modifier)
    return word if name == key else word[0].upper() + word[1:]


def article(word, a="a"):
    return f"{a}n {word}" if word[0] in "aeiou" else f"{a} {word}"


def then(nodes, rest):
    """Return nodes and then `rest`, as a linked list (node, rest). Branches of a search can share its end."""
    for node in reversed(nodes):
        rest = (node, rest)
    return rest


def tell(seed, **slots):
    """Return (text, slots) of the fable of this seed. Given slots, such as hero="Pim", are kept."""
    rng = random.Random(f"fable {seed}")  # a string, because its whole hash is the seed
    return say(RULES["fable"][0], rng, slots)


def say(nodes, rng, slots):
    """Expand nodes and draw every choice at random. Return (text, slots with the words that were drawn)."""
    parts, todo = [], then(nodes, None)
    while todo:
        node, rest = todo
        said = node if isinstance(node, str) else expand(node, slots)
        if isinstance(said, str):
            parts.append(said)
            todo = rest
            continue
        options, slot = said
        option = options[int(rng.random() * len(options))]
        if slot is None:
            todo = then(option, rest)
        else:
            slots = {**slots, slot: option}  # the same node comes next again: now its slot is filled
    return "".join(parts), slots


def derivations(text):
    """Return every way in which the grammar can generate exactly this text, as a list of (bits, slots)."""
    found, branches = [], [(0, 0.0, {}, then(RULES["fable"][0], None))]
    while branches:
        at, bits, slots, todo = branches.pop()
        if todo is None:
            if at == len(text):
                found.append((bits, slots))
            continue
        node, rest = todo
        said = node if isinstance(node, str) else expand(node, slots)
        if isinstance(said, str):
            if text.startswith(said, at):
                branches.append((at + len(said), bits, slots, rest))
            continue
        options, slot = said
        bits += math.log2(len(options))
        for option in options:
            if slot is None:
                branches.append((at, bits, slots, then(option, rest)))
            else:
                branches.append((at, bits, {**slots, slot: option}, todo))
    return found


TOKENIZER = "bpe:2048"


def documents(seed, count):
    """Return an iterator of `count` fables, or of 40,000 if count is 0."""
    return (tell(f"{seed}/{i}")[0] for i in range(count or 40_000))


def bits(text):
    """Return -log2 of the probability that the grammar generates this fable."""
    ((information, _),) = derivations(text)  # exactly one, or the entropy floor would be wrong
    return information


def is_held_out(kind, plot):
    """Return whether this pair of a hero's kind and a plot is held out from training. One pair in ten is."""
    return zlib.crc32(f"{kind} {plot}".encode()) % 10 == 0


QUESTIONS = {
    "friend": ("Who else is in this fable about {hero}?", "Besides {hero} there is {friend} the {fkind}."),
    "kind": ("What kind of animal is {hero}?", "{Hero} is {a kind}."),
    "home": ("Where does {hero} live?", "{Hero} lives near {place}."),
    "lesson": ("What is the lesson of this fable?", "The lesson is: {lesson}."),
}
TASKS = ["tell", "rewrite", *QUESTIONS]


def records(seed, count, held_out=False):
    """Yield conversations to train on, or held-out ones of one turn, whose answers follows() can check. Each is a list
    of messages, dicts with role and content. A user's message also has an input and the whole turn."""
    # training repeats the tasks that need a whole fable, because they are the hardest
    tasks, where = (TASKS, f"{seed}/held out") if held_out else ([*TASKS, "tell", "tell", "rewrite"], seed)
    for i in range(count):
        turns = conversation(f"{where}/{i}", tasks[i % len(tasks)], held_out)
        messages = []
        for turn in turns[:1] if held_out else turns:
            messages.append({"role": "user", "content": turn["instruction"], "input": turn["input"], "turn": turn})
            messages.append({"role": "assistant", "content": turn["output"]})
        yield messages


def conversation(seed, task, held_out=False):
    """Return an instruction about a fable, then questions about the same fable, with the grammar's answers. Each turn
    in the list is a dict with task, instruction, input, output and the keys by which follows() checks an answer. Either
    all fables of the conversation have a held-out pair, or none has."""
    rng = random.Random(f"conversation {seed}")
    kind, plot = rng.choice(POOLS["animal"]), rng.choice(POOLS["plot"])
    while is_held_out(kind, plot) != held_out:
        kind, plot = rng.choice(POOLS["animal"]), rng.choice(POOLS["plot"])
    does, given = say(PLOTS[plot], rng, {"hero": rng.choice(POOLS["name"]), "kind": kind, "plot": plot})
    text, slots = say(RULES["summarized fable" if task == "tell" else "fable"][0], rng, given)
    questions = rng.sample(list(QUESTIONS), len(QUESTIONS))
    if task in QUESTIONS:
        questions = [task, *(other for other in questions if other != task)]
    elif task == "tell":
        ask = f"{rng.choice(['Tell', 'Write'])} a fable about {article(kind)} named {slots['hero']} who {does}."
        words = [word for slot, word in given.items() if slot != "plot"]
        first = {"instruction": ask, "input": "", "output": text, "words": words, "not": []}
    else:
        others = [animal for animal in POOLS["animal"] if animal not in slots.values()]
        others = [animal for animal in others if is_held_out(animal, plot) == held_out]
        if not others:  # some plots have one held-out animal only
            return conversation(f"{seed} again", task, held_out)
        new = rng.choice(others)
        retold = text
        while kind in words_of(retold):  # a guest, for example, can be of the old kind
            retold, _ = say(RULES["summarized fable"][0], rng, {**slots, "kind": new})
        words = [new, *(slots[slot] for slot in ("hero", "friend", "fkind", "place"))]
        ask = f"Rewrite this fable with {article(new)}."
        first = {"instruction": ask, "input": text, "output": retold, "words": words, "not": [kind]}
        questions = []  # two fables are long enough
    turns = [] if task in QUESTIONS else [{**first, "task": task, "lessons": POOLS[plot]}]
    for question in questions:
        ask, answer = (say(parse(said), rng, slots)[0] for said in QUESTIONS[question])
        context = "" if turns else text  # later turns are about the same fable
        turns.append({"task": question, "instruction": ask, "input": context, "output": answer})
    return turns


def words_of(text):
    return set(re.findall(r"\w+", text))


def follows(turn, answer):
    """Return whether an answer follows its instruction. A question has one right answer. A fable must contain the
    requested words, exactly two names and a lesson of the plot. A rewritten fable must not mention the old animal."""
    if "words" not in turn:
        return answer.strip() == turn["output"]
    words = words_of(answer)
    asked = all(words.issuperset(word.split()) for word in turn["words"]) and words.isdisjoint(turn["not"])
    lesson = any(lesson in answer or lesson[1:] in answer for lesson in turn["lessons"])
    return asked and lesson and len(words & set(POOLS["name"])) == 2


if __name__ == "__main__":
    print(tell(int(sys.argv[1]) if len(sys.argv) > 1 else 0)[0])
