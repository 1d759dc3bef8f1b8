"""Convert records of any usual format to conversations, and conversations to tokens with a chat template.

A conversation is a list of messages: dicts with "role" ("user" or "assistant") and "content". A user's message may have
an "input", the text that its content is about, and a "system" message before it. An assistant's message with "learn":
False is context only. docs/records.md lists the formats that are read or refused."""

import functools
import json
import re
from collections import Counter
from datetime import datetime

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from support.settings import UserError, user_errors

# our name for a column: its names in records
COLUMNS = {"messages": ("messages", "conversations", "conversation"),
           "instruction": ("instruction", "prompt", "question"), "input": ("input", "context"),
           "response": ("output", "response", "completion", "answer"), "system": ("system", "system_prompt"),
           "history": ("history",)}  # fmt: skip
FIELDS = {"role": ("role", "from"), "content": ("content", "value"), "weight": ("weight",), "train": ("train",)}
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant",
         "bot": "assistant", "system": "system", "developer": "system"}  # fmt: skip
# columns of a record and fields of a message that change what should be learned: refused unless empty
REFUSED = {"chosen", "rejected", "label", "labels", "completions", "kto_tag", "tools", "functions", "tool_calls",
           "tool_call_id", "function_call", "reasoning_content", "thinking", "image", "images", "audio", "audios",
           "video", "videos"}  # fmt: skip


def read_messages(record, notes=None):
    """Return the conversation in a record. Raises UserError for a record that cannot be understood.

    notes: a Counter of the parts that were not read, by a short description."""
    notes = Counter() if notes is None else notes
    found = read_fields(record, COLUMNS, notes, "column")
    if found["messages"] is not None:
        notes.update(f"column {key!r}" for key in ("instruction", "input", "response", "history") if found[key])
        return read_turns(found["messages"], found["system"], notes)
    instruction, response = found["instruction"], found["response"]
    if record.keys().isdisjoint(COLUMNS["instruction"] + COLUMNS["response"]):
        known = ", ".join("/".join(names) for names in COLUMNS.values())
        raise UserError(f"it has {', '.join(record)}; known are {known}. For texts use prepare.py and train.py")
    if isinstance(instruction, list) or isinstance(response, list):  # as in TRL, where only the completion is learned
        asked = instruction if isinstance(instruction, list) else [{"role": "user", "content": instruction}]
        answers = response if isinstance(response, list) else [{"role": "assistant", "content": response}]
        if not all(isinstance(message, dict) for message in [*asked, *answers]):
            raise UserError("it has a list, but not of messages: if it lists several answers, make a record of each")
        notes.update(f"column {key!r}" for key in ("input", "history") if found[key])
        return read_turns([message | {"weight": 0} for message in asked] + answers, found["system"], notes)
    keys, history = ("instruction", "input", "response", "system"), found["history"] or []
    instruction, context, response, system = (as_text(found[key], key, notes) for key in keys)
    pairs = history if isinstance(history, list) else [history]
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise UserError("history is not a list of pairs, [question, answer]")
    if response.strip() and not (instruction + context + system).strip():
        raise UserError(f"it has a response but no instruction: it has {', '.join(record)}")
    pairs = [[as_text(text, "history", notes) for text in pair] for pair in pairs]
    turns = [(question, "", answer) for question, answer in pairs] + [(instruction, context, response)]
    turns[0] += (system,)
    return [message for turn in turns for message in exchange(*turn)]


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
        values = {name: given.pop(name) for name in spellings if name in given}
        if len(set(map(repr, values.values()))) > 1:
            raise UserError(f"both {' and '.join(values)} have a value: keep one of them")
        found[key] = next(iter(values.values()), None)
    notes.update(f"{kind} {key!r}" for key in given)
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
        messages += exchange(join_texts(asked), "", text, join_texts(system))
        messages[-1] |= {"learn": False} if 0 in (found["weight"], found["train"]) else {}
        asked, system = [], []
    for message in messages[1:-1:2]:  # an empty response teaches the model to end at once
        if not message["content"].strip() and message.get("learn", True):
            message["learn"] = False
            notes["empty response in the middle"] += 1
    notes["last message without a response"] += bool(messages and (asked or system))
    return messages or exchange(join_texts(asked), "", "", join_texts(system))


def join_texts(texts):
    """Join the texts that are not empty as paragraphs. A single one stays as it is."""
    texts = [text for text in texts if text]
    return texts[0] if len(texts) == 1 else "\n\n".join(filter(None, map(str.strip, texts)))


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


def exchange(instruction, context, response, system=""):
    """Return an instruction and its response as messages."""
    user = {"role": "user", "content": instruction, "input": context}
    user |= {"system": system.strip()} if system.strip() else {}
    return [user, {"role": "assistant", "content": response}]


# Text of the template, then a space and the placeholder of a content, or the end. A template that trims the content
# also removes the em space on that side
PIECE = re.compile(r"(.*?)(?:( ?)(\u2003?)\0([0-9]+)\0(\u2003?)|\Z)", re.DOTALL)


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
        context = message.get("input")
        texts = {"content": join_texts([message.get("system"), message["content"], "" if knows_input else context])}
        if knows_input and context:
            texts["input"] = context
        marks = {key: f"\u2003\0{i}\0\u2003" for i, key in enumerate(texts, len(contents))}
        contents += [(text, message) for text in texts.values()]
        marked.append({"role": message["role"], **marks})
        plain.append({"role": message["role"], **texts})
    pieces = PIECE.findall(render(template, marked, tokenizer))
    if sorted(int(number) for *_, number, _ in pieces if number) != list(range(len(contents))):
        raise UserError("the chat template leaves out or repeats messages: choose another format with --template")
    # prompt: text that is not encoded yet; learn: right after a response, whether it is learned
    ids, is_label, prompt, learn, rendered = [], [], "", None, ""

    def add(new_ids, flag=False):
        """Add token ids after those of the prompt."""
        nonlocal prompt
        prompt_ids, prompt = tokenizer.encode(prompt).tolist(), ""
        ids.extend([*prompt_ids, *new_ids])
        is_label.extend([False] * len(prompt_ids) + [flag] * len(new_ids))

    for own_text, space, left, number, right in pieces:
        rendered += own_text
        if learn is not None:  # a response ends with the token after it, or with end-of-text, and the model learns that
            end = tokenizer.response_ends.match(own_text)
            add([tokenizer.ids_of_markers[end[0]] if end else tokenizer.eot], learn)
            own_text, learn = own_text[end.end() if end else 0 :], None
            if not number:  # nothing follows the end of the last response
                break
        for i, text in enumerate(tokenizer.markers.split(own_text)):  # text, special token, text, ...
            if i % 2:
                add([tokenizer.ids_of_markers[text]])
            else:
                prompt += text
        if number:
            text, message = contents[int(number)]
            text = text if left else text.lstrip()
            text = space + (text if right else text.rstrip())
            rendered += text
            if message["role"] == "user":
                prompt += text
            else:
                learn = message.get("learn", True)
                add(tokenizer.encode(text).tolist(), learn)
    add([])
    if rendered != render(template, plain, tokenizer):
        raise UserError("the chat template changes the text of a message: choose another format with --template")
    if too_large := [i for i in ids if i >= tokenizer.rows]:
        raise UserError(f"the chat template has a token with the id {too_large[0]}, beyond the model's embedding")
    return ids, is_label


def end_of_response(tokenizer, template):
    """Return the id of the token that ends a response in this chat template."""
    return encode_conversation(tokenizer, exchange("a", "", "b"), template)[0][-1]


def render(template, messages, tokenizer):
    """Return the text of messages in a chat template."""
    values = {**tokenizer.names, "messages": messages, "tools": None, "documents": None}
    values["add_generation_prompt"] = messages[-1]["role"] != "assistant"
    with user_errors("the chat template cannot be rendered, choose another with --template"):
        return compile_template(template).render(values)


@functools.cache
def compile_template(template):
    """Compile a Jinja template as transformers does, in a sandbox, because published models bring their own."""

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    env.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)  # Jinja's own escapes HTML
    env.globals |= {"raise_exception": raise_exception, "strftime_now": lambda form: datetime.now().strftime(form)}
    # {% generation %} marks a response for training in transformers, and changes no text
    template = re.sub(r"({%[-+]?\s*)generation\b", r"\1if true", template)
    return env.from_string(re.sub(r"({%[-+]?\s*)endgeneration\b", r"\1endif", template))
