"""HTML out of nested elements, in which every text is escaped."""

from __future__ import annotations

import html
import re

_VOID = {"img", "meta"}
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def element(name: str, /, *children: object, **attributes: object) -> Markup:
    """`element("td", "a < b", class_="label")` is `<td class="label">a &lt; b</td>`.

    Args:
        children: Elements, which stay what they are; all else is text. None is left out.
        attributes: `stroke_width` is written stroke-width, `class_` class. None is left out.
    """
    present = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    given = "".join(f' {key}="{text(value)}"' for key, value in present.items())
    if name in _VOID:
        return Markup(f"<{name}{given}>")
    return Markup(f"<{name}{given}>{joined(*children)}</{name}>")


def joined(*children: object) -> Markup:
    """Elements and texts one after the other."""
    return Markup("".join(text(child) for child in children if child is not None))


def text(value: object) -> Markup:
    """Escaped; what no HTML file can hold, such as control characters, becomes the replacement character."""
    return value if isinstance(value, Markup) else Markup(html.escape(_UNPRINTABLE.sub("\ufffd", str(value))))
