"""COCO datasets and their evaluation, on annotation files as people have them.

Both read with :func:`~emo2_mm.datasets.coco_file.read_coco`, so that training and evaluation agree. The tools
put them in the place of MMDetection's ``CocoDataset`` and ``CocoMetric``.
"""

from __future__ import annotations

from typing import Any

from mmdet.datasets import CocoDataset as _CocoDataset
from mmdet.datasets.api_wrappers import COCO
from mmdet.evaluation import CocoMetric as _CocoMetric
from mmengine.fileio import get_local_path
from mmengine.logging import print_log

from ..errors import UserError
from .coco_eval import faster_evaluation
from .coco_file import arrange_categories, read_coco
from .report import Report


def make_index(content: dict[str, Any]) -> COCO:
    """pycocotools' index of the content of an annotation file."""
    api = COCO()
    api.dataset = content
    api.createIndex()
    api.img_ann_map, api.cat_img_map = api.imgToAnns, api.catToImgs
    return api


class CocoDataset(_CocoDataset):
    """MMDetection's ``CocoDataset`` with a tolerant reader; labels follow the classes, not the file.

    Args:
        verify_images: Compare names and sizes of all images with the files before training.
        **kwargs: Arguments of MMDetection's ``CocoDataset``.

    Raises:
        UserError: If the annotation file cannot be used; it names file, entry and remedy.
    """

    def __init__(self, *args: Any, verify_images: bool = False, **kwargs: Any) -> None:
        self.verify_images = verify_images
        self.boxes = dict(given=0, kept=0)
        super().__init__(*args, **kwargs)

    def COCOAPI(self, path: str) -> COCO:
        """Read the annotation file, as ``load_data_list`` does through this name."""
        loaders = self.pipeline.transforms
        stored = any(getattr(t, 'color_type', '') == 'color_ignore_orientation' for t in loaders)
        report = Report()
        content = read_coco(
            path,
            report,
            classes=self.metainfo['classes'],
            folder=self.data_prefix.get('img', '') if self.backend_args is None else None,
            verify=self.verify_images,
            masks=any(getattr(t, 'with_mask', False) for t in loaders),
            ignore_orientation=stored,
        )
        if not self.verify_images:  # loading one will name it: perhaps only some are used
            report.found.pop('IMG001', None)
        report.raise_errors()
        report.tell(log=True)
        if report.found.get('COCO046'):
            for loader in loaders:
                if hasattr(loader, 'color_type'):
                    loader.color_type = 'color_ignore_orientation'
        return make_index(content)

    def parse_data_info(self, raw_data_info: dict[str, Any]) -> Any:
        """Parse an image and its boxes, and count the boxes."""
        info = super().parse_data_info(raw_data_info)
        self.boxes['given'] += len(raw_data_info['raw_ann_info'])
        self.boxes['kept'] += len(info['instances'])
        return info

    def filter_data(self) -> list[dict[str, Any]]:
        """Filter by ``filter_cfg``, and say how many boxes and images are dropped."""
        found = super().filter_data()
        kept, given = self.boxes['kept'], self.boxes['given']
        self._tell(kept, given, 'boxes (no area, outside, or of no class of the config)')
        self._tell(len(found), len(self.data_list), 'images (no boxes, or too small)')
        if not found:
            raise UserError(
                f'{self.ann_file}: none of its {len(self.data_list)} images can be used; {kept} of its '
                f'{given} boxes have an area inside their image and a class of the config'
            )
        return found

    def _tell(self, kept: int, given: int, what: str) -> None:
        if kept < given:
            print_log(f'{self.ann_file}: {given - kept} of {given} {what} are dropped', 'current')


class CocoMetric(_CocoMetric):
    """MMDetection's ``CocoMetric`` with the reader of :class:`CocoDataset`.

    Args:
        ann_file: Annotation file. Defaults to the ground truth of the dataset.
        **kwargs: Arguments of MMDetection's ``CocoMetric``.

    Raises:
        UserError: If the annotation file cannot be used; it names file, entry and remedy.
    """

    def __init__(self, ann_file: str | None = None, **kwargs: Any) -> None:
        super().__init__(ann_file=None, **kwargs)
        if ann_file is not None:
            report = Report()
            with get_local_path(ann_file, backend_args=self.backend_args) as path:
                content = read_coco(path, report, masks='segm' in self.metrics)
            report.raise_errors()
            self._coco_api = make_index(content)

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Evaluate, with categories in the order of the classes and sizes of the images as loaded."""
        if self._coco_api is not None and self.cat_ids is None:
            content = self._coco_api.dataset
            classes = self.dataset_meta['classes']
            content['categories'] = arrange_categories(content['categories'], classes, '', Report())
            self._coco_api = make_index(content)
            self.cat_ids: list[int] = [category['id'] for category in content['categories'][: len(classes)]]
            for truth, _ in results:
                image = self._coco_api.imgs.get(truth['img_id'], {})
                image.setdefault('width', truth['width'])
                image.setdefault('height', truth['height'])
        with faster_evaluation():
            return super().compute_metrics(results)
