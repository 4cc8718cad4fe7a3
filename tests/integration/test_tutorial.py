"""The tutorial notebook runs from its folder, with everything that it trains."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.tiny import ROOT


@pytest.mark.slow
@pytest.mark.timeout(1800)  # it trains for minutes
def test_tutorial_runs(tmp_path: Path) -> None:
    packages = 'nbclient ipykernel mmpretrain mmdet onnxruntime matplotlib skimage sklearn'
    for name in packages.split():
        pytest.importorskip(name, reason=f'the tutorial needs {name}')
    import nbformat
    from nbclient import NotebookClient

    for name in ('configs', 'tools'):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / 'docs', tmp_path / 'docs')
    notebook = nbformat.read(tmp_path / 'docs/tutorial.ipynb', as_version=4)
    NotebookClient(
        notebook,
        timeout=1200,
        kernel_name='python3',
        resources={'metadata': {'path': str(tmp_path / 'docs')}},
    ).execute()

    work_dir = tmp_path / 'work_dirs/tutorial'
    for name in ('detect/epoch_10.pth', 'curves.png', 'detector.onnx', 'attention.png'):
        assert (work_dir / name).stat().st_size > 0
    predictions = [
        json.loads(path.read_text())['objects'] for path in (work_dir / 'predictions/preds').iterdir()
    ]
    assert len(predictions) == 40 and any(predictions)
