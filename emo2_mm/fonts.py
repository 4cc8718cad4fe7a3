"""A font for matplotlib, which draws pictures, that has the characters of class names. Needs matplotlib."""

from __future__ import annotations

from typing import Any, Iterable

import matplotlib
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font


def use_font_for(names: Iterable[str]) -> str | None:
    """Let matplotlib draw these names, with another installed font if the current one lacks a character.

    Args:
        names: Class names.

    Returns:
        What cannot be drawn, for a message; None if all can.
    """
    wanted = {ord(char) for name in names for char in name if char.isprintable()}
    if not _lacks(findfont(FontProperties()), wanted):
        return None
    missing = wanted
    for entry in sorted(fontManager.ttflist, key=lambda entry: (entry.weight != 400, entry.fname)):
        if entry.name.startswith('Last Resort'):  # matplotlib's placeholders for any character
            continue
        lacks = _lacks(entry.fname, wanted)
        missing = min(missing, lacks, key=len)
        if not lacks:
            settings: Any = matplotlib.rcParams  # its type lists the keys, and takes no other strings
            for family in ('sans-serif', 'serif', 'monospace'):
                known = settings[f'font.{family}']
                settings[f'font.{family}'] = list(dict.fromkeys([entry.name, *known]))
            return None
    shown = ''.join(map(chr, sorted(missing)[:10]))
    return (
        f'no installed font has the characters {shown!r} of the class names: pictures show squares in their '
        'place; install a font that has them, such as Noto Sans CJK (Debian: apt-get install fonts-noto-cjk)'
    )


def _lacks(file: str, characters: set[int]) -> set[int]:
    try:
        return characters - get_font(file).get_charmap().keys()
    except (OSError, RuntimeError):  # a file that FreeType cannot read
        return characters
