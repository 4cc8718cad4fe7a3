"""A folder of images for each class. Needs MMPretrain."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any, Sequence

from mmpretrain.datasets import CustomDataset

from ..errors import UserError, printable
from .files import IMAGE_SUFFIXES, in_words, list_files, subfolders
from .report import Report


class FolderDataset(CustomDataset):
    """MMPretrain's ``CustomDataset`` for all images that can be loaded; labels follow the classes by name.

    Args:
        extensions: Suffixes of the images, in any case. Defaults to all that OpenCV reads.
        **kwargs: Arguments of ``CustomDataset``.

    Raises:
        UserError: If folders are no classes of the config, or hold no image.
    """

    def __init__(self, *args: Any, extensions: Sequence[str] = IMAGE_SUFFIXES, **kwargs: Any) -> None:
        super().__init__(*args, extensions=extensions, **kwargs)

    def _find_samples(self) -> list[Any]:
        """List the images of each class."""
        if not self.with_label:
            return super()._find_samples()
        names = subfolders(self.img_prefix)
        if self.CLASSES is None:
            self._metainfo['classes'] = tuple(names)
        classes = list(self.CLASSES)
        odd = [name for name in names if name not in classes]
        if odd and len(names) != len(classes):
            raise UserError(
                f'{self.img_prefix} has folders that are no class of the config: '
                f'{printable(", ".join(odd[:10]))}; the classes are {", ".join(classes[:10])}'
            )
        # Folders may be called otherwise than the classes, as those of ImageNet: then their order counts
        self.folder_to_idx = (
            {n: classes.index(n) for n in names} if not odd else {n: i for i, n in enumerate(names)}
        )
        samples, report, empty = [], Report(), []
        others: Counter = Counter()
        for name, label in self.folder_to_idx.items():
            folder = os.path.join(self.img_prefix, name)
            listing = list_files(folder, self.extensions)
            samples += [(f'{name}/{image}', label) for image in listing.images]
            others += listing.others
            empty += [] if listing.images else [name]
        if empty:
            report.add('CLS022', f'{self.img_prefix}: {", ".join(empty)}')
        if others:
            report.add('IMG017', f'{self.img_prefix}: {in_words(others)}')
        if not samples:
            raise UserError(
                f'{self.img_prefix} has no image in the folders of its classes; suffixes that can be read: '
                f'{", ".join(sorted(self.extensions))}'
            )
        report.tell(log=True)
        return samples
