"""Data that training cannot use: name the file and stop, or leave it out and say how much."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, Iterator
from unittest.mock import patch

from mmengine.dataset import BaseDataset
from mmengine.logging import print_log
from mmengine.runner import Runner


class FaultyData(RuntimeError):
    """A sample of a data set that cannot be prepared, with the names of its files."""


class NamedSamples:
    """What a data set prepares its samples with, so that whatever fails names the file.

    Args:
        dataset: A data set; the pipeline that it has at the time is used.
    """

    def __init__(self, dataset: BaseDataset) -> None:
        self.dataset = dataset

    def __call__(self, index: int) -> Any:
        """Prepare a sample.

        Raises:
            FaultyData: If a transform fails, or a mask or a map is not as large as its image.
        """
        data = self.dataset.get_data_info(index)
        files = ' with '.join(str(data[key]) for key in ('img_path', 'seg_map_path') if data.get(key))
        for transform in self.dataset.pipeline.transforms:
            has_map = 'gt_seg_map' in data
            try:
                if getattr(transform, 'with_mask', False):
                    check_masks(data)
                data = transform(data)
                if data is None:  # the data set takes another sample then
                    return None
                if not has_map and 'gt_seg_map' in data:
                    check_map(data)
            except Exception as error:
                if not files:
                    raise
                raise FaultyData(
                    f'{files}: {type(transform).__name__}: {type(error).__name__}: {error}\n'
                    'If that is a fault of the file: python tools/check_dataset.py CONFIG finds all such'
                ) from error
        return data


def check_masks(data: dict[str, Any]) -> None:
    """Refuse masks in run lengths that are not as large as their image: they would get other shapes."""
    for instance in data.get('instances') or []:
        mask = instance.get('mask')
        if isinstance(mask, dict) and tuple(mask['size']) != tuple(data['ori_shape'][:2]):
            sizes = (*mask['size'], *data['ori_shape'][:2])
            raise ValueError('a mask is {} x {} pixels, its image {} x {} (height x width)'.format(*sizes))


def check_map(data: dict[str, Any]) -> None:
    """Refuse a map that is not as large as its image: crops would hide that, for they cut both."""
    shape, image = data['gt_seg_map'].shape, tuple(data['ori_shape'][:2])
    if len(shape) == 2 and tuple(shape) != image:
        raise ValueError('its map is {} x {} pixels, the image {} x {}'.format(*shape, *image))


def inner_datasets(dataset: Any) -> list[Any]:
    """The data sets inside wrappers such as RepeatDataset and ConcatDataset."""
    if hasattr(dataset, 'datasets'):
        return [inner for part in dataset.datasets for inner in inner_datasets(part)]
    return inner_datasets(dataset.dataset) if hasattr(dataset, 'dataset') else [dataset]


def report_failing_files(runner: Runner) -> None:
    """Let the data sets that a runner builds name the files that they fail on."""
    build = runner.build_dataloader

    def build_dataloader(*args: Any, **kwargs: Any) -> Any:
        loader = build(*args, **kwargs)
        for dataset in inner_datasets(loader.dataset):
            if getattr(type(dataset), 'prepare_data', None) is BaseDataset.prepare_data:
                dataset.prepare_data = NamedSamples(dataset)
        return loader

    runner.build_dataloader = build_dataloader


@contextmanager
def log_dropped_annotations(scope: str | None) -> Iterator[None]:
    """Log how many boxes and images MMDetection's CocoDataset leaves out as it reads its annotations."""
    if scope != 'mmdet':
        yield
        return
    from mmdet.datasets import CocoDataset

    parse, select = CocoDataset.parse_data_info, CocoDataset.filter_data
    boxes = dict(given=0, kept=0)  # since the last data set

    def parse_data_info(self: CocoDataset, raw: dict[str, Any]) -> Any:
        boxes['given'] += len(raw['raw_ann_info'])
        info = parse(self, raw)
        boxes['kept'] += len(info['instances'])
        return info

    def filter_data(self: CocoDataset) -> list[dict[str, Any]]:
        before, found = len(self.data_list), select(self)
        tell(boxes['kept'], boxes['given'], 'boxes (no area, outside, or of no class of the config)', self)
        tell(len(found), before, 'images (no boxes, or too small)', self)
        boxes.update(given=0, kept=0)
        return found

    def tell(kept: int, given: int, what: str, dataset: CocoDataset) -> None:
        if kept < given:
            print_log(f'{dataset.ann_file}: {given - kept} of {given} {what} are left out', 'current')

    with patch.multiple(CocoDataset, parse_data_info=parse_data_info, filter_data=filter_data):
        yield
