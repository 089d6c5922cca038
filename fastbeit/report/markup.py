"""HTML that can't be injected into: everything is escaped unless it was made here."""

from __future__ import annotations

from html import escape


class Markup(str):
    """Text that is HTML already. Only :func:`tag`, :func:`join` and trusted literals make it."""


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """``<name attributes>children</name>``, children and values escaped unless Markup.

    ``class_`` and ``for_`` stand for the words that Python reserves, other underscores for hyphens;
    an attribute that is None or False is left out, True stands alone.
    """
    parts = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        parts.append(f" {key}" if value is True else f' {key}="{escape(str(value))}"')
    opening = f"<{name}{''.join(parts)}>"
    if name in ("img", "meta", "br"):
        return Markup(opening)
    return Markup(f"{opening}{join(*children)}</{name}>")


def join(*children: object) -> Markup:
    """Children one after the other; None is skipped, plain text escaped."""
    return Markup(
        "".join(
            child if isinstance(child, Markup) else escape(str(child), quote=False)
            for child in children
            if child is not None
        )
    )
