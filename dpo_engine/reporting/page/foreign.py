"""Make text from data safe to display: characters that hide or reorder text become visible names."""

from __future__ import annotations

import re

from jinja2.utils import markupsafe

HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028\u2029\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
"""Control characters, unpaired surrogates, invisible characters, and characters that change the text direction."""


def visible(text: str, longest: int = 2000) -> str:
    """Replace hidden characters by names such as ``⟨U+202E⟩``, and shorten text to about `longest` characters.

    Line feeds and tabs are kept. HTML is not escaped, because the page never inserts this text as HTML.
    """
    if len(text) > longest:
        text = f"{text[:longest]} … ({len(text) - longest:,} more characters)"
    return HIDDEN.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text)


def breakable(text: str) -> markupsafe.Markup:
    """Return text as HTML in which lines can break after each ``/``, so that paths break between their components."""
    return markupsafe.Markup(str(markupsafe.escape(text)).replace("/", "/<wbr>"))
