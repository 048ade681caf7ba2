"""Chat templates: messages to the text that a model was taught to answer, by Jinja in a sandbox as Hugging Face does.

A template comes with a model and is somebody else's program, so that it runs in Jinja's immutable sandbox. What a user
says must not become a control token: see `Rendered`.
"""

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_OPEN, _CLOSE = "\ue000", "\ue001"  # of Unicode's private use: around the number of what was taken out of a message


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A chat as text. parts: (text, whether control tokens in it are meant): the template's are, a user's never are."""

    parts: tuple[tuple[str, bool], ...]

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.parts)

    def after(self, beginning: "Rendered") -> "Rendered | None":
        """What follows `beginning`; None where this doesn't begin with it."""
        if not self.text.startswith(beginning.text):
            return None
        skip, parts = len(beginning.text), []
        for text, meant in self.parts:
            parts.append((text[skip:], meant))
            skip = max(skip - len(text), 0)
        return Rendered(parts=tuple((text, meant) for text, meant in parts if text))


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    control_tokens: Sequence[str] = (),
    add_generation_prompt: bool = True,
    **variables: Any,
) -> Rendered:
    """Fills in a chat template.

    Args:
      template: Jinja, as tokenizer_config.json's `chat_template` holds it.
      messages: each with `role` and `content`, and whatever else the template asks for.
      control_tokens: texts of the tokenizer's special tokens. Where a message's content holds one, that is plain text.
      add_generation_prompt: whether the text ends where the assistant begins to answer.
      **variables: what else templates ask for: bos_token, eos_token, tools, ...

    Raises ValueError with one line where the template can't be read or refuses the messages, ImportError without Jinja.
    """
    if any(_OPEN in str(m.get("content", "")) or _CLOSE in str(m.get("content", "")) for m in messages):
        raise ValueError("a message holds U+E000 or U+E001, which have no meaning: take them out")
    taken: list[str] = []
    messages = [_without_control(message, control_tokens, taken) for message in messages]
    filled = _fill(template, messages=messages, add_generation_prompt=add_generation_prompt, **variables)
    parts, rest = [], filled
    while _OPEN in rest:
        before, _, behind = rest.partition(_OPEN)
        number, _, rest = behind.partition(_CLOSE)
        parts += [(before, True), (taken[int(number)], False)]
    parts.append((rest, True))
    return Rendered(parts=tuple((text, meant) for text, meant in parts if text))


def answered_turns(template: str, messages: Sequence[Mapping[str, Any]], **how: Any) -> list[tuple[Rendered, Rendered]]:
    """For each message of the assistant: what asks for it, and the answer with the template's text behind it.

    how: as `render` takes it. Raises ValueError, too, where a template shows an answered chat otherwise than its own
    question followed by the answer.
    """
    turns = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = render(template, messages[:index], add_generation_prompt=True, **how)
        answer = render(template, messages[: index + 1], add_generation_prompt=False, **how).after(asked)
        if answer is None:
            raise ValueError(
                f"the chat template shows message {index + 1} otherwise than as an answer to what asks for it: train "
                "on plain prompts and completions"
            )
        turns.append((asked, answer))
    return turns


def _without_control(message: Mapping[str, Any], control_tokens: Sequence[str], taken: list[str]) -> dict[str, Any]:
    content, tokens = message.get("content"), sorted(filter(None, control_tokens), key=len, reverse=True)
    if isinstance(content, str) and tokens:

        def take(found: re.Match) -> str:
            taken.append(found[0])
            return f"{_OPEN}{len(taken) - 1}{_CLOSE}"

        content = re.sub("|".join(map(re.escape, tokens)), take, content)
    return {**message, "content": content}


def _fill(template: str, **variables: Any) -> str:
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("chat templates need Jinja: pip install -e '.[open]'") from error
    try:
        return _compiled(template).render(**variables)
    except (jinja2.exceptions.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise ValueError(f"the chat template refuses these messages: {' '.join(str(error).split())}") from None


@functools.lru_cache(maxsize=8)  # compiling takes longer than filling in, and a data set has thousands of chats
def _compiled(template: str) -> Any:
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what an assistant says, for those who train by it; the text is the same."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **rest: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **rest)  # Jinja's own would escape HTML

    extensions = [loopcontrols, Generation]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    return environment.from_string(template)
