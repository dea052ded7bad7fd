"""The frame of every page: one file, its style inside."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib import resources

REPORT = "report.html"


def document(title: str, body: Sequence[str]) -> str:
    """A whole page from pieces of HTML; ``title`` is plain text."""
    css = (resources.files("visalign.report") / "style.css").read_text(encoding="utf-8")
    return ("<!doctype html>\n<html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width, initial-scale=1'>"
            f"<title>{escape(title)}</title><style>{css}</style></head><body>{''.join(body)}</body></html>\n")
