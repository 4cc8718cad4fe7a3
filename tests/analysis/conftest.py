"""What the tests of this folder share."""

from __future__ import annotations

from typing import Any, Callable

import pytest


@pytest.fixture
def figure(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """A function that returns the last figure that was saved."""
    from matplotlib.figure import Figure

    drawn, save = [], Figure.savefig

    def keep(self: Any, *args: Any, **kwargs: Any) -> None:
        drawn.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, 'savefig', keep)
    return lambda: drawn[-1]
