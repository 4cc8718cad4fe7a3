"""Accuracy of bundles on the validation data of a config, by the metrics of the config."""

from __future__ import annotations

import copy
from importlib import import_module
from pathlib import Path
from typing import Any, Sequence

import numpy as np
import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.registry import init_default_scope

from ..config import innermost_dataset
from . import predict

HEADLINES = ('segm_mAP', 'bbox_mAP', 'top1', 'mIoU')  # first what says most of a task


def validation_dataset(cfg: Config) -> Any:
    """The data set of the config's ``val_dataloader``.

    Raises:
        FileNotFoundError: If the config has none, or the files are not there.
    """
    if not cfg.get('val_dataloader'):
        raise FileNotFoundError('the config has no val_dataloader')
    init_default_scope(cfg.default_scope)
    datasets = import_module(f'{cfg.default_scope}.registry').DATASETS
    return datasets.build(copy.deepcopy(innermost_dataset(cfg.val_dataloader.dataset)))


def validation_images(cfg: Config) -> list[Path]:
    """Paths of the validation images; none if they are not there."""
    try:
        dataset = validation_dataset(cfg)
    except (OSError, ValueError, AssertionError, RuntimeError):
        return []
    paths = [Path(dataset.get_data_info(i)['img_path']) for i in range(len(dataset))]
    return [path for path in paths if path.is_file()]


def as_prediction(model: predict.Model, path: str, sample: Any) -> dict[str, Any]:
    """A sample of the data set, as a dict, with what a bundle finds in its image."""
    prepared = model.prepare(path)
    found = sample.to_dict()
    answers = model.entry['answers']
    if answers == 'probabilities':
        scores = torch.from_numpy(model.run(prepared.array)['probabilities'][0])
        found.update(pred_score=scores, pred_label=scores.argmax(0, keepdim=True))
    elif answers in ('map', 'logits'):
        found['pred_sem_seg'] = dict(data=torch.from_numpy(model.map(prepared).astype(np.int64))[None])
    else:
        dets, labels, masks = model.detections(prepared)
        found['pred_instances'] = dict(
            bboxes=torch.from_numpy(dets[:, :4]),
            scores=torch.from_numpy(dets[:, 4]),
            labels=torch.from_numpy(labels.astype(np.int64)),
        )
        if masks is not None:
            thr = model.meta['mask_thr']
            pasted = [predict.paste_mask(m, d, prepared.size, thr) for m, d in zip(masks, dets)]
            found['pred_instances']['masks'] = [predict.encode_mask(mask) for mask in pasted]
    return found


def evaluate(cfg: Config, folder: Path, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """The metrics of the config's ``val_evaluator`` for models of a bundle.

    Args:
        cfg: The config.
        folder: The bundle.
        names: Of its models.

    Raises:
        FileNotFoundError: If the validation data are not there.
    """
    dataset = validation_dataset(cfg)
    evaluators = {}
    for name in names:
        evaluators[name] = Evaluator(copy.deepcopy(cfg.val_evaluator))
        evaluators[name].dataset_meta = dataset.metainfo
    models = {name: predict.Model(folder, name, torch.get_num_threads()) for name in names}
    for i in range(len(dataset)):
        sample = dataset[i]['data_samples']
        path = sample.metainfo.get('img_path') or dataset.get_data_info(i)['img_path']
        for name, model in models.items():
            evaluators[name].process(data_samples=[as_prediction(model, path, sample)])
    return {
        name: {key: float(value) for key, value in each.evaluate(len(dataset)).items()}
        for name, each in evaluators.items()
    }


def headline(metrics: dict[str, float]) -> str:
    """The name of the metric that says most."""
    for wanted in HEADLINES:
        for key in metrics:
            if key.split('/')[-1] == wanted:
                return key
    return next(iter(metrics))
