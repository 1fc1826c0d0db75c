"""Render chat templates with limits on time and output, because a template is code from the model's checkpoint."""

from __future__ import annotations

import datetime
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from jinja2 import TemplateError, TemplateRuntimeError
from jinja2.exceptions import SecurityError
from transformers.utils import chat_template_utils

from dpo_engine.errors import ConfigError

TEMPLATE_S = 2
"""Limit on the CPU time for rendering one conversation, in seconds."""
TEMPLATE_CHARACTERS = 2**26
CLOCK = "strftime_now"
"""Name of the function that transformers provides to templates to read the date."""


def render_within_limits(render: Callable[[], str], key: str) -> str:
    """Call ``render``, which renders a template, and return its result.

    key   start of the error messages, with a space at the end, for example ``data.chat_template=null: the template of
          PATH``

    Raises :class:`ConfigError` if the template violates its sandbox, runs for too long or produces too much text.
    Raises `jinja2.TemplateError` if the template rejects the conversation or fails.
    """

    def unfit(what: str) -> ConfigError:
        return ConfigError(f"{key}{what}; set data.chat_template to a file with another template")

    try:
        with _seconds(TEMPLATE_S):
            text = render()
    except (SecurityError, OverflowError) as error:  # raised by the sandbox, and by its limit on loops
        raise unfit(f"performs a forbidden operation ({error})") from error
    except TimeoutError as error:
        raise unfit(f"takes more than {TEMPLATE_S} s for one conversation") from error
    except TemplateError:
        raise
    except Exception as error:
        raise TemplateRuntimeError(str(error) or type(error).__name__) from error
    if len(text) > TEMPLATE_CHARACTERS:
        raise unfit(f"produces {len(text):,} characters for one conversation, more than {TEMPLATE_CHARACTERS:,}")
    return text


def sources(template: str | Mapping[str, str] | None) -> list[str]:
    """Return the Jinja sources of a tokenizer's chat template, or of all its named templates."""
    if template is None:
        return []
    return [template] if isinstance(template, str) else list(template.values())


def read_template(file: str | Path) -> str:
    """Read a chat template file. Raises :class:`ConfigError` if it is not a readable text file."""
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        what = f"data.chat_template={file}: cannot be read ({error}); set it to a text file"
        raise ConfigError(what) from error


def reads_clock(tokenizer: str | Path, chat_template: str | Path | None) -> bool:
    """Return whether the chat template files of a run contain the name of the function that reads the date."""
    folder = Path(tokenizer)
    names = ("chat_template.jinja", "tokenizer_config.json", "chat_template.json")
    own = [*(folder / name for name in names), *folder.glob("additional_chat_templates/*.jinja")]
    files = own if chat_template is None else [Path(chat_template)]
    return any(CLOCK.encode() in file.read_bytes() for file in files if file.is_file())


def stop_clock(source: str, date: datetime.date) -> None:
    """Set the current time to noon of ``date`` for templates with this source. Other processes are not affected.

    transformers passes only plain data to templates, so the function that reads the date cannot be passed as a
    variable. Instead, it is replaced in the compiled template, which transformers caches by source.
    """

    def strftime_now(form: str) -> str:
        return datetime.datetime.combine(date, datetime.time(12)).strftime(form)

    chat_template_utils._compile_jinja_template(source).globals[CLOCK] = strftime_now


@contextmanager
def _seconds(limit: float) -> Iterator[None]:
    """Raise `TimeoutError` if the ``with`` block uses `limit` seconds of CPU time. Only the main thread has a limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
