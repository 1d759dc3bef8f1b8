"""Convert records of any usual format to conversations, and conversations to tokens with a chat template.

A conversation is a list of messages: dicts with "role" ("user" or "assistant") and "content". A user's message may have
an "input", the text that its content is about, and a "system" message before it. An assistant's message with "learn":
False is context only. docs/records.md lists the formats that are read or refused."""

import itertools
import re
from collections import Counter

from support.settings import UserError
from support.templates import render

# our name for a column: its names in records
COLUMNS = {
    "messages": ("messages", "conversations", "conversation"), "instruction": ("instruction", "prompt", "question"),
    "input": ("input", "context"), "response": ("output", "response", "completion", "answer"),
    "system": ("system", "system_prompt"), "history": ("history",),
}  # fmt: skip
FIELDS = {"role": ("role", "from"), "content": ("content", "value"), "weight": ("weight",), "train": ("train",)}
ROLES = {
    "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant",
    "bot": "assistant", "system": "system", "developer": "system",
}  # fmt: skip
# columns of a record and fields of a message that change what should be learned: refused unless empty
REFUSED = {
    "chosen", "rejected", "label", "labels", "completions", "kto_tag", "tools", "functions", "tool_calls",
    "tool_call_id", "function_call", "reasoning_content", "thinking", "image", "images", "audio", "audios", "video",
    "videos",
}  # fmt: skip


def read_messages(record, notes=None):
    """Return the conversation in a record. Raises UserError for a record that cannot be understood.

    notes: a Counter of the parts that were not read, by a short description."""
    notes = Counter() if notes is None else notes
    found = read_fields(record, COLUMNS, notes, "column")
    if found["messages"] is not None:
        notes.update(f"column {key!r}" for key in ("instruction", "input", "response", "history") if found[key])
        return read_turns(found["messages"], found["system"], notes)
    instruction, response = found["instruction"], found["response"]
    if instruction is None and response is None:
        known = ", ".join("/".join(names) for names in COLUMNS.values())
        raise UserError(f"it has {', '.join(record)}; known are {known}. For texts use prepare.py and train.py")
    if isinstance(instruction, list) or isinstance(response, list):  # as in TRL, where only the completion is learned
        asked = instruction if isinstance(instruction, list) else [{"role": "user", "content": instruction}]
        answers = response if isinstance(response, list) else [{"role": "assistant", "content": response}]
        context = [message | {"weight": 0} for message in asked if isinstance(message, dict)]
        if len(context) < len(asked) or not all(isinstance(message, dict) for message in answers):
            raise UserError("it has a list, but not of messages: if it lists several answers, make a record of each")
        notes.update(f"column {key!r}" for key in ("input", "history") if found[key])
        return read_turns([*context, *answers], found["system"], notes)
    texts = [as_text(found[key], key, notes) for key in ("instruction", "input", "response", "system")]
    history = found["history"] or []
    is_list = isinstance(history, list)
    if not is_list or not all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in history):
        raise UserError("history is not a list of pairs, [question, answer]")
    if texts[2].strip() and not any(map(str.strip, (texts[0], texts[1], texts[3]))):
        raise UserError(f"it has a response but no instruction: it has {', '.join(record)}")
    pairs = [[as_text(text, "history", notes) for text in turn] for turn in history]
    turns = [exchange(question, "", answer) for question, answer in pairs]
    return with_system([*itertools.chain(*turns), *exchange(*texts[:3])], texts[3:])


def read_fields(record, names, notes, kind):
    """Return {our name: value} of a dict, with None for a missing one. Two names with two values are refused."""
    if not isinstance(record, dict):
        raise UserError(f"it is {type(record).__name__}, not an object")
    # pandas writes an empty cell as NaN, which does not equal itself
    given = {key: value for key, value in record.items() if value not in (None, "", [], {}) and value == value}
    if refused := sorted(key for key in given.keys() & REFUSED if key != "label" or isinstance(given[key], bool)):
        raise UserError(f"its {kind} {refused[0]!r} is not supported, and ignoring it would change the training data")
    found = {}
    for key, spellings in names.items():
        values = {name: given[name] for name in spellings if name in given}
        if len(set(map(repr, values.values()))) > 1:
            raise UserError(f"both {' and '.join(values)} have a value: keep one of them")
        is_empty = key in ("instruction", "response") and not record.keys().isdisjoint(spellings)
        found[key] = next(iter(values.values()), "" if is_empty else None)
    known = {name for spellings in names.values() for name in spellings}
    notes.update(f"{kind} {key!r}" for key in given.keys() - known)
    return found


def read_turns(turns, system, notes):
    """Return messages, in any usual spelling, as a conversation."""
    if not isinstance(turns, list) or not turns:
        raise UserError(f"its messages are {type(turns).__name__}, not a list")
    messages, asked = [], []  # asked: the user's texts since the last response
    system = [as_text(system, "system", notes)] if system else []
    for number, turn in enumerate(turns, 1):
        found = read_fields(turn, FIELDS, notes, "field")
        if (role := ROLES.get(str(found["role"]))) is None:
            raise UserError(f"message {number} has the role {found['role']!r}; known are {', '.join(ROLES)}")
        for key in ("weight", "train"):
            if found[key] not in (None, 0, 1):
                raise UserError(f"message {number} has the {key} {found[key]!r}; only 0 and 1 are supported")
        text = as_text(found["content"], f"content of message {number}", notes)
        if role != "assistant":
            if not text.strip():
                raise UserError(f"message {number} has no content")
            (system if role == "system" else asked).append(text)
            continue
        if not asked and not system:
            raise UserError(f"message {number} is the assistant's, with no user's message before it")
        messages += with_system(exchange(join_texts(asked), "", text), system)
        messages[-1] |= {"learn": False} if 0 in (found["weight"], found["train"]) else {}
        asked, system = [], []
    for message in messages[1:-1:2]:  # an empty response teaches the model to end at once
        if not message["content"].strip() and message.get("learn", True):
            message["learn"] = False
            notes["empty response in the middle"] += 1
    notes["last message without a response"] += bool(messages and (asked or system))
    return messages or with_system(exchange(join_texts(asked), "", ""), system)


def join_texts(texts):
    return texts[0] if len(texts) == 1 else "\n\n".join(map(str.strip, texts))


def with_system(messages, texts):
    return [messages[0] | ({"system": system} if (system := join_texts(texts).strip()) else {}), *messages[1:]]


def as_text(value, name, notes):
    """Return a string, whole number or list of text parts as a string; "" for None. Refuse anything else."""
    value = "" if value is None or value != value else value
    if isinstance(value, list):
        given = [{k for k, v in part.items() if v is not None} if isinstance(part, dict) else part for part in value]
        is_text = [keys == {"type", "text"} and part["type"] == "text" for keys, part in zip(given, value, strict=True)]
        parts = [part.get("text") for part in value] if all(is_text) else value
        if all(isinstance(part, str) for part in parts) and (all(is_text) or len(parts) == 1):
            value = "".join(parts)
    if type(value) not in (str, int):
        raise UserError(f"its {name} is {type(value).__name__}, not text")
    text = str(value).encode(errors="replace").decode()  # JSON can hold half of a surrogate pair
    notes["unpaired surrogate, replaced by ?"] += text != str(value)
    return text


def exchange(instruction, context, response):
    """Return an instruction and its response as messages."""
    return [{"role": "user", "content": instruction, "input": context}, {"role": "assistant", "content": response}]


# The placeholder of a content in the rendered template, and the space before it. A template that trims the content also
# removes the em space on that side
PLACE = re.compile("( ?)(\u2003?)\0([0-9]+)\0(\u2003?)")


def encode_conversation(tokenizer, messages, template):
    """Return the token ids of a conversation, and for each id whether it is a label: part of a learned response, or
    the token that ends one. With the template "short" these ids are labels:

        <|endoftext|>Instruction: Who is it?\\nResponse: Emil.<|endoftext|>
                                                        ^^^^^^^^^^^^^^^^^^^

    template: the text of a chat template. If the last message is a user's, the ids are a prompt for the response.
    Training and sampling both call this function, so their prompts cannot differ. The ids equal those of transformers'
    apply_chat_template(), except that the name of a special token in a message stays text."""
    knows_input = re.search(r"\bm\.input\b", template)  # the templates in lora.py do
    # contents: (text, its message); marked: messages with a mark for each text; plain: messages with the texts
    contents, marked, plain = [], [], []
    for message in messages:
        texts = {"content": message["content"], "input": message.get("input") or ""}
        if message.get("system"):
            texts["content"] = f"{message['system'].strip()}\n\n{texts['content'].strip()}".strip()
        if not knows_input and texts["input"]:
            texts = {"content": f"{texts['content'].strip()}\n\n{texts['input'].strip()}"}
        marks = {}
        for key, text in texts.items():
            if text or key == "content":
                marks[key] = f"\u2003\0{len(contents)}\0\u2003"
                contents.append((text, message))
        marked.append({"role": message["role"], **marks})
        plain.append({"role": message["role"], **{key: text for key, text in texts.items() if key in marks}})
    pieces, rendered = PLACE.split(render(template, marked, tokenizer)), ""
    if sorted(map(int, pieces[3::5])) != list(range(len(contents))):
        raise UserError("the chat template leaves out or repeats messages: choose another format with --template")
    stream = []  # str: text of the prompt; int: a special token; tuple: a response, and whether it is learned
    for own_text, space, left, number, right in zip(*(pieces[i::5] + [""] * (i > 0) for i in range(5)), strict=True):
        # split() alternates: text, special token, text, ...
        rendered += own_text
        if stream and isinstance(stream[-1], tuple) and (end := tokenizer.plain_markers.match(own_text)):
            stream.append(
                tokenizer.ids_of_markers[end[0]]
            )  # an added token that is not special can end a response, too
            own_text = own_text[end.end() :]
        named = enumerate(tokenizer.markers.split(own_text))
        stream += [tokenizer.ids_of_markers[text] if i % 2 else text for i, text in named if text]
        if number:
            text, message = contents[int(number)]
            text = text if left else text.lstrip()
            text = space + (text if right else text.rstrip())
            rendered += text
            stream.append(text if message["role"] == "user" else (text, message.get("learn", True)))
    if rendered != render(template, plain, tokenizer):
        raise UserError("the chat template changes the text of a message: choose another format with --template")
    end = tokenizer.eot
    while messages[-1]["role"] == "assistant" and not isinstance(stream[-1], tuple):
        end = stream.pop()  # nothing follows the end of the last response
    if isinstance(stream[-1], tuple):
        stream.append(end if isinstance(end, int) else tokenizer.eot)
    ids, is_response, prompt, learn = [], [], "", None  # prompt: not encoded yet; learn: set right after a response

    def add(new_ids, learn=False):
        ids.extend(map(int, new_ids))
        is_response.extend([learn] * len(new_ids))

    if too_large := [i for i in stream if isinstance(i, int) and i >= tokenizer.rows]:
        raise UserError(f"the chat template has a token with the id {too_large[0]}, beyond the model's embedding")
    for item in stream:
        if isinstance(item, str) and learn is not None:  # the template has no token after a response
            add([tokenizer.eot], learn)
            learn = None
        if isinstance(item, str):
            prompt += item
            continue
        add(tokenizer.encode(prompt))
        prompt = ""
        if isinstance(item, int):  # the model learns to end a response, too
            add([item], bool(learn))
            learn = None
        else:
            text, learn = item
            add(tokenizer.encode(text), learn)
    add(tokenizer.encode(prompt))
    return ids, is_response


def end_of_response(tokenizer, template):
    """Return the id of the token that ends a response in this chat template."""
    ids, is_response = encode_conversation(tokenizer, exchange("a", "", "b"), template)
    return ids[-1 - is_response[::-1].index(True)]
