"""Packaging of emo2_mm; tools and lint settings are in pyproject.toml."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildPy(build_py):
    """Add ``emo2_mm/.mim``, where `mim` looks for configs and tools, to what is installed.

    The files are copied into the build only, so the source tree holds them once.
    """

    def run(self) -> None:
        super().run()
        if getattr(self, 'editable_mode', False):
            return
        target = Path(self.build_lib) / 'emo2_mm' / '.mim'
        if target.exists():  # left by an earlier build, perhaps of other files
            shutil.rmtree(target)
        ignore = shutil.ignore_patterns('__pycache__', '*.py[co]', 'make_env.sh')
        for name in ('configs', 'tools'):
            shutil.copytree(ROOT / name, target / name, ignore=ignore)
        index = ROOT / 'model-index.yml'
        if index.exists():
            shutil.copy2(index, target)


def version() -> str:
    found: dict[str, str] = {}
    exec((ROOT / 'emo2_mm' / 'version.py').read_text(encoding='utf-8'), found)
    return found['__version__']


# mmengine is asked for in the extras only: its forks own the same modules under other
# distribution names, and a hard requirement would put the original over a fork.
engine = [
    'mmengine>=0.10.4,<1',
    'mmcv>=2.0.0,<2.2.0',
    'numpy<2',
    'opencv-python<4.11',
    'setuptools<82',
]
cls = [*engine, 'mmpretrain>=1.2.0,<2']
kd = [*cls, 'timm>=1.0.7,<2']
det = [*engine, 'mmdet>=3.3.0,<4', 'pycocotools']
seg = [*engine, 'mmsegmentation>=1.2.2,<2', 'ftfy', 'regex']
onnx = ['onnx>=1.17,<2', 'onnxruntime>=1.19,<2']
demo = [*cls, *det, 'matplotlib', 'rich', 'scikit-image', 'scikit-learn']
dev = [
    *demo,
    *kd,
    *seg,
    *onnx,
    'codespell',
    'hypothesis',
    'pre-commit',
    'pytest>=7.3',
    'pytest-timeout',
    'pytest-xdist',
    'ruff',
]

setup(
    name='emo2_mm',
    version=version(),
    description='EMOv2, a light vision backbone, for mmpretrain, mmdetection and mmsegmentation',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    classifiers=[
        'License :: OSI Approved :: Apache Software License',
        'Operating System :: OS Independent',
        'Programming Language :: Python :: 3',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
    keywords='computer vision, backbone, EMOv2, OpenMMLab, object detection',
    packages=find_packages(include=['emo2_mm', 'emo2_mm.*']),
    python_requires='>=3.8',
    install_requires=['torch>=2.1'],
    extras_require={
        'cls': cls,
        'kd': kd,
        'det': det,
        'seg': seg,
        'onnx': onnx,
        'demo': sorted(set(demo)),
        'dev': sorted(set(dev)),
    },
    cmdclass={'build_py': BuildPy},
    zip_safe=False,
)
