"""
Make records whose answers are either right or wrong: short customer messages, each with its order as JSON.

    python data/orders.py              # writes data/orders.json: 1,200 records
    python lora.py --init_from=google/gemma-3-270m --data=data/orders.json

Each message combines phrases at random. A held-out message combines known phrases in a new way."""

import json
import random
from pathlib import Path

COUNTS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "eight": 8, "ten": 10, "a dozen": 12,
          "two dozen": 24, "half a dozen": 6}  # fmt: skip
COLOURS = ["black", "white", "grey", "red", "blue", "green", "yellow", "brown", "silver"]
THINGS = ["desk lamps", "office chairs", "coffee mugs", "notebooks", "garden hoses", "backpacks", "wall clocks",
          "storage boxes", "umbrellas", "water bottles", "phone cases", "bath towels", "picture frames",
          "door handles", "tool boxes", "paint brushes", "extension cords", "flower pots", "cutting boards",
          "rain jackets"]  # fmt: skip
CITIES = ["Lyon", "Porto", "Utrecht", "Leeds", "Graz", "Turin", "Malmö", "Gdańsk", "Brno", "Cork", "Bilbao",
          "Leipzig", "Ghent", "Tampere", "Bergen", "Zagreb", "Szeged", "Kraków", "Bern", "Aarhus"]  # fmt: skip
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
NAMES = ["Ines", "Tomasz", "Aoife", "Luca", "Marta", "Henrik", "Sofia", "Jakub", "Clara", "Emre", "Noor", "Pavel",
         "Greta", "Andrei", "Lena", "Mateo"]  # fmt: skip

GREETINGS = ["", "Hi, ", "Hello there! ", "Good morning, ", "Quick order: ", "Me again. "]
REQUESTS = ["please send {order}{city}{day}.", "could you ship {order}{city}{day}?", "we need {order}{city}{day}.",
            "I would like {order}{city}{day}.", "can I get {order}{city}{day}?",
            "put me down for {order}{city}{day}."]  # fmt: skip
ENDINGS = ["", " Thanks, {name}", " Best wishes, {name}", " {name} here, by the way.", " Regards, {name}"]
CHANGES = ["", "", "", " Sorry, make that {count}.", " No, wait: {count} of them.", " Actually, {count} will do."]

INSTRUCTION = "Extract the order from the message as JSON with the keys item, quantity, city, day and customer."


def record(rng):
    """Return one record: instruction, input, output."""
    item = f"{rng.choice(COLOURS)} {rng.choice(THINGS)}" if rng.random() < 0.7 else rng.choice(THINGS)
    order = {"item": item, "quantity": None, "city": None, "day": None, "customer": None}

    def count():
        words, number = rng.choice([*COUNTS.items(), *((str(n), n) for n in rng.sample(range(2, 200), 8))])
        order["quantity"] = number  # the last count in the message is the valid one
        return words

    def maybe(key, choices, phrases):
        if rng.random() < 0.25:
            return ""
        order[key] = rng.choice(choices)
        return rng.choice(phrases).format(order[key])

    city = maybe("city", CITIES, [" to {}", " to our shop in {}", " to my address in {}"])
    day = maybe("day", DAYS, [" by {}", " for {}", " on {}", ", at the latest on {}"])
    request = rng.choice(REQUESTS).format(order=f"{count()} {item}", city=city, day=day)
    text = rng.choice(GREETINGS) + request
    if change := rng.choice(CHANGES):
        text += change.format(count=count())
    if "{name}" in (ending := rng.choice(ENDINGS)):
        order["customer"] = rng.choice(NAMES)
        text += ending.format(name=order["customer"])
    return {
        "instruction": INSTRUCTION,
        "input": text[0].upper() + text[1:],
        "output": json.dumps(order, ensure_ascii=False),
    }


def main(count=1200, path=None, seed=0):
    rng, path = random.Random(seed), path or Path(__file__).with_name("orders.json")
    records = {r["input"]: r for r in (record(rng) for _ in range(count))}  # no duplicate messages
    path.write_text(json.dumps(list(records.values()), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{path}: {len(records):,} records")


if __name__ == "__main__":
    main()
