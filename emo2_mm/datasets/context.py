"""Data that training cannot use: name the file and stop, or leave it out and say how much."""

from __future__ import annotations

from typing import Any

from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.runner import Runner

from ..config import iter_nodes


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


OWN_TYPES = {  # type in a config -> the one here that takes data as people have it
    'CocoDataset': 'emo2_mm.datasets.coco.CocoDataset',
    'CocoMetric': 'emo2_mm.datasets.coco.CocoMetric',
    'BaseSegDataset': 'emo2_mm.datasets.segmentation.SegDataset',
    'CustomDataset': 'emo2_mm.datasets.classification.FolderDataset',
}


def use_own_datasets(cfg: Config) -> None:
    """Name the datasets and metrics of :data:`OWN_TYPES` in a config, in place of those they derive from.

    What derives from these, such as ``ADE20KDataset``, stays as it is.
    """
    scope = cfg.get('default_scope')
    for stage in ('train', 'val', 'test'):
        loader, evaluator = cfg.get(f'{stage}_dataloader') or {}, cfg.get(f'{stage}_evaluator') or []
        for _, node in iter_nodes([loader.get('dataset') or [], evaluator], stage):
            kind = node.get('type')
            name = kind.replace(f'{scope}.', '') if isinstance(kind, str) else None
            if name in OWN_TYPES:
                node['type'] = OWN_TYPES[name]
