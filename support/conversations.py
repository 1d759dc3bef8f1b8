"""Convert records of any usual format to conversations, and conversations to tokens with a chat template.

A conversation is a list of messages: dicts with "role" ("user" or "assistant") and "content". A user's message may have
an "input", the text that its content is about, and a "system" message before it. An assistant's message with "learn":
False is context only. docs/records.md lists the formats that are read or refused."""

import functools
import itertools
import json
import re
from collections import Counter
from datetime import datetime

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from support.settings import UserError, user_errors

# our name for a column: its names in records
COLUMNS = {"messages": ("messages", "conversations", "conversation"), "system": ("system", "system_prompt"),
           "instruction": ("instruction", "prompt", "question"), "input": ("input", "context"),
           "response": ("output", "response", "completion", "answer")}  # fmt: skip
FIELDS = {"role": ("role", "from"), "content": ("content", "value"), "weight": ("weight", "train")}  # of a message
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant",
         "bot": "assistant", "system": "system", "developer": "system"}  # fmt: skip
# columns of a record and fields of a message that change what should be learned: refused unless empty
REFUSED = {"chosen", "rejected", "label", "labels", "completions", "kto_tag", "tools", "functions", "tool_calls",
           "tool_call_id", "function_call", "reasoning_content", "thinking", "history", "image", "images", "audio",
           "audios", "video", "videos"}  # fmt: skip


def read_messages(record, notes=None):
    """Return the conversation in a record. Raises UserError for a record that cannot be understood.
    notes: a Counter of the parts that were not read, by a short description."""
    notes = Counter() if notes is None else notes
    found = read_fields(record, COLUMNS, notes, "column")
    instruction, response = found["instruction"], found["response"]
    if found["messages"] is not None:
        notes.update(f"column {key!r}" for key in ("instruction", "input", "response") if found[key])
        return read_turns(found["messages"], found["system"], notes)
    if isinstance(instruction, list) and isinstance(response, list):  # as in TRL, where only the completion is learned
        notes["column 'input'"] += found["input"] is not None
        return read_turns(instruction + response, found["system"], notes, num_context=len(instruction))
    keys = ("instruction", "input", "response", "system")
    instruction, context, response, system = (as_text(found[key], key, notes) for key in keys)
    is_unknown = record.keys().isdisjoint(COLUMNS["instruction"] + COLUMNS["response"])
    if is_unknown or (response.strip() and not (instruction + context + system).strip()):
        known = ", ".join("/".join(names) for names in COLUMNS.values())
        reason = f"no instruction in {', '.join(record)}; known are {known}"
        raise UserError(f"{reason}. For texts use prepare.py and train.py")
    return exchange(instruction, context, response, system)


def read_fields(record, names, notes, kind):
    """Return {our name: value} of a dict, with None for a missing one. Two names with two values are refused."""
    if not isinstance(record, dict):
        raise UserError(f"{'a message' if kind == 'field' else 'it'} is {type(record).__name__}, not an object")
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


def read_turns(turns, system, notes, num_context=0):
    """Return messages, in any usual spelling, as a conversation. The first num_context messages are context only."""
    if not isinstance(turns, list) or not turns:
        raise UserError(f"its messages are {type(turns).__name__}, not a list")
    messages, asked = [], []  # asked: the user's texts since the last response
    system = [as_text(system, "system", notes)] if system else []
    for number, turn in enumerate(turns, 1):
        found = read_fields(turn, FIELDS, notes, "field")
        if (role := ROLES.get(str(found["role"]))) is None:
            raise UserError(f"message {number} has the role {found['role']!r}; known are {', '.join(ROLES)}")
        if found["weight"] not in (None, 0, 1):
            raise UserError(f"message {number} has the weight/train {found['weight']!r}; only 0 and 1 are supported")
        text = as_text(found["content"], f"content of message {number}", notes)
        if role != "assistant":
            if not text.strip():
                raise UserError(f"message {number} has no content")
            (system if role == "system" else asked).append(text)
            continue
        if not asked and not system:
            raise UserError(f"message {number} is the assistant's, with no user's message before it")
        messages += exchange(join_texts(asked), "", text, join_texts(system))
        if number <= num_context or found["weight"] == 0 or not text.strip():
            messages[-1]["learn"] = False  # an empty response would teach the model to end at once
        notes["empty response"] += not text.strip()
        asked, system = [], []
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
        parts = [{k: v for k, v in part.items() if v is not None} if isinstance(part, dict) else {} for part in value]
        if all(part == {"type": "text", "text": str(part.get("text"))} for part in parts):
            value = "".join(part["text"] for part in parts)
    if type(value) not in (str, int):
        several = "; make a record of each answer" if isinstance(value, list) and name == "response" else ""
        raise UserError(f"its {name} is {type(value).__name__}, not text{several}")
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
    # parts: (text or token id, whether it is a label); None for a prompt's text, which is encoded with its neighbors
    parts, learn, rendered = [], None, ""
    for own_text, space, left, number, right in pieces:
        rendered += own_text
        if learn is not None:  # a response ends with the token after it, or with end-of-text, and the model learns that
            end = tokenizer.markers.match(own_text)
            parts.append((tokenizer.ids_of_markers[end[0]] if end else tokenizer.eot, learn))
            own_text = own_text[end.end() if end else 0 :]
            if not number:  # nothing follows the end of the last response
                break
        for i, text in enumerate(tokenizer.markers.split(own_text)):  # text, added token, text, ...
            parts.append((tokenizer.ids_of_markers[text], False) if i % 2 else (text, None))
        if number:
            text, message = contents[int(number)]
            text = text if left else text.lstrip()
            text = space + (text if right else text.rstrip())
            rendered += text
            learn = None if message["role"] == "user" else message.get("learn", True)
            parts.append((text, learn))
    if rendered != render(template, plain, tokenizer):
        raise UserError("the chat template changes the text of a message: choose another format with --template")
    ids, is_label = [], []
    for flag, group in itertools.groupby(parts, key=lambda part: part[1]):
        values = [value for value, _ in group]
        for value in ["".join(values)] if flag is None else values:
            new_ids = [value] if isinstance(value, int) else tokenizer.encode(value).tolist()
            ids += new_ids
            is_label += [bool(flag)] * len(new_ids)
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
