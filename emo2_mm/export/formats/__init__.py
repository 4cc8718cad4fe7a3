"""Formats that a model is exported to: what each needs, how it is written, and what it cannot do.

A format is an entry of :data:`FORMATS`. Its file is run by the class of the same name in
:mod:`emo2_mm.export.predict`, which is copied into every bundle: what is checked is what is shipped.
"""

from __future__ import annotations

from ...errors import UserError
from . import coreml, executorch, litert, mnn, ncnn, onnx, openvino, torchscript, web
from .base import Format, Source

__all__ = ['FORMATS', 'Format', 'Source', 'find_formats']

FORMATS: dict[str, Format] = {
    module.FORMAT.name: module.FORMAT
    for module in (onnx, openvino, torchscript, ncnn, mnn, coreml, web, litert, executorch)
}


def find_formats(names: list[str]) -> list[Format]:
    """Formats by name; ``all`` is every one whose packages are installed.

    Raises:
        UserError: If a name is unknown, or a package is missing.
    """
    if names == ['all']:
        return [each for each in FORMATS.values() if not each.missing()]
    unknown = [name for name in names if name not in FORMATS]
    if unknown:
        raise UserError(f'--format {unknown[0]} is unknown; give one of {", ".join(FORMATS)}, or all')
    found = [FORMATS[name] for name in dict.fromkeys(names)]
    for each in found:
        each.require()
    return found
