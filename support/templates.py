"""Chat templates in Jinja, rendered as transformers renders them."""

import functools
import json
from datetime import datetime

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from support.settings import user_errors


def render(template, messages, tokenizer):
    """Return the text of messages in a chat template."""
    values = {**tokenizer.named_tokens(), "messages": messages, "tools": None, "documents": None}
    values["add_generation_prompt"] = messages[-1]["role"] != "assistant"
    with user_errors("the chat template cannot be rendered, choose another with --template"):
        return compile_template(template).render(**values)


class GenerationTag(Extension):
    """{% generation %}, which marks a response in the templates of transformers and changes no text."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


@functools.cache
def compile_template(template):
    """Compile a Jinja template as transformers does, in a sandbox, because published models bring their own."""

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, **options):  # Jinja's own escapes HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    extensions = [GenerationTag, "jinja2.ext.loopcontrols"]
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    env.filters["tojson"] = tojson
    env.globals |= {"raise_exception": raise_exception, "strftime_now": lambda form: datetime.now().strftime(form)}
    return env.from_string(template)
