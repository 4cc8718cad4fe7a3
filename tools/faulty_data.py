"""Data that training cannot use: name the file and stop, or leave it out and say how much."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, Iterator
from unittest.mock import patch

import runtime
from mmengine.dataset import Compose
from mmengine.hooks import Hook
from mmengine.runner import Runner

REMEDY = 'python tools/check_dataset.py CONFIG says what is wrong, with this and all other files'


class FaultyData(RuntimeError):
    """A file of a data set that cannot be used."""


class NamingPipeline(Compose):
    """A pipeline that names the file it fails on.

    Args:
        pipeline: The pipeline of a data set.
        trains: Whether the data set is trained on; then maps must always be as large as their images.
    """

    def __init__(self, pipeline: Compose, trains: bool) -> None:
        super().__init__(pipeline.transforms)
        self.trains = trains

    def __call__(self, data: dict[str, Any]) -> dict[str, Any] | None:
        """Apply the transforms.

        Raises:
            FaultyData: If one fails, or a mask or a map is not as large as its image.
        """
        files = ' with '.join(str(data[key]) for key in ('img_path', 'seg_map_path') if data.get(key))
        try:
            self._check_masks(data)
            for transform in self.transforms:
                data = transform(data)
                if data is None:
                    return None
                if self.trains:
                    self._check_map(data)
        except Exception as error:
            kind = '' if type(error) is ValueError else f'{type(error).__name__}: '
            raise FaultyData(f'{files}: {kind}{error}\n{REMEDY}') from error
        return data

    @staticmethod
    def _check_masks(data: dict[str, Any]) -> None:
        for instance in data.get('instances') or []:
            mask = instance.get('mask')
            if isinstance(mask, dict) and list(mask['size']) != [data['height'], data['width']]:
                raise ValueError(
                    'a mask is {} x {} pixels, its image {} x {} (height x width)'.format(
                        *mask['size'], data['height'], data['width']
                    )
                )

    @staticmethod
    def _check_map(data: dict[str, Any]) -> None:
        if 'img' in data and 'gt_seg_map' in data:
            sizes = data['gt_seg_map'].shape[:2], data['img'].shape[:2]
            if sizes[0] != sizes[1]:
                raise ValueError('its map is {} x {} pixels, the image {} x {}'.format(*sizes[0], *sizes[1]))


class NameFaultyDataHook(Hook):
    """Let the data sets of a run name the file they fail on."""

    def before_run(self, runner: Runner) -> None:
        for loop, trains in (
            (runner._train_loop, True),
            (runner._val_loop, False),
            (runner._test_loop, False),
        ):
            if hasattr(loop, 'dataloader'):
                for dataset in innermost(loop.dataloader.dataset):
                    if isinstance(getattr(dataset, 'pipeline', None), Compose):
                        dataset.pipeline = NamingPipeline(dataset.pipeline, trains)


def innermost(dataset: Any) -> list[Any]:
    """The data sets inside wrappers such as RepeatDataset and ConcatDataset."""
    if hasattr(dataset, 'datasets'):
        return [inner for part in dataset.datasets for inner in innermost(part)]
    return innermost(dataset.dataset) if hasattr(dataset, 'dataset') else [dataset]


@contextmanager
def counted(scope: str) -> Iterator[None]:
    """Say how many boxes and images MMDetection leaves out of a data set of COCO's format, as it reads it."""
    if scope != 'mmdet':
        yield
        return
    from mmdet.datasets import CocoDataset

    parse, load, select = CocoDataset.parse_data_info, CocoDataset.load_data_list, CocoDataset.filter_data
    boxes = dict(given=0, kept=0)

    def parse_data_info(self: CocoDataset, raw: dict[str, Any]) -> Any:
        given = len(raw['raw_ann_info'])
        info = parse(self, raw)
        boxes['given'] += given
        boxes['kept'] += len(info['instances'])
        return info

    def load_data_list(self: CocoDataset) -> list[dict[str, Any]]:
        boxes.update(given=0, kept=0)
        found = load(self)
        tell(boxes['given'] - boxes['kept'], boxes['given'], 'boxes', self.ann_file)
        return found

    def filter_data(self: CocoDataset) -> list[dict[str, Any]]:
        before, found = len(self.data_list), select(self)
        tell(before - len(found), before, 'images', self.ann_file)
        return found

    def tell(number: int, given: int, what: str, file: str) -> None:
        if number:
            runtime.note(f'{file}: {number} of {given} {what} are left out; {REMEDY}')

    with patch.multiple(
        CocoDataset, parse_data_info=parse_data_info, load_data_list=load_data_list, filter_data=filter_data
    ):
        yield
