"""Custom datasets of four tiny images in each of the three formats."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.tiny import write_custom_data


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder that holds what the three formats ask for: four images, the last two for validation."""
    write_custom_data(tmp_path / 'own', train=(0, 1), val=(2, 3))
    return tmp_path / 'own'
