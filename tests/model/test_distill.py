"""A classifier that learns from a teacher: its loss, and a teacher that stays out of its state."""

from __future__ import annotations

import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.checkpoints import BOMBS
from helpers.tiny import ROOT, SIDE
from mmengine.config import Config
from mmengine.model import ExponentialMovingAverage, MMDistributedDataParallel
from mmengine.optim import build_optim_wrapper
from torch import Tensor

from emo2_mm.attention import SEWMHSA

pytest.importorskip('mmpretrain')
from helpers.teacher import CLASSES, batch, build, classifier, losses_of, write_teacher  # noqa: E402
from mmpretrain.models import BaseClassifier, ImageClassifier  # noqa: E402
from mmpretrain.registry import MODELS  # noqa: E402

from emo2_mm.distill import DistilledImageClassifier  # noqa: E402

KD_CONFIGS = sorted((ROOT / 'configs/cls').glob('*_kd.py'))


@MODELS.register_module()
class PixelTeacher(BaseClassifier):
    """Keeps what it is shown; its scores are means of a channel over parts of the image."""

    def __init__(self, pretrained: bool, classes: int = CLASSES, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.classes = classes

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen = inputs
        return 9 * torch.stack([part.mean((1, 2, 3)) for part in inputs.chunk(self.classes, dim=2)], dim=1)


def pixel_teacher(**preprocessor: Any) -> dict[str, Any]:
    data_preprocessor = dict(type='mmpretrain.ClsDataPreprocessor', **preprocessor)
    return dict(type='PixelTeacher', pretrained=True, data_preprocessor=data_preprocessor)


def grad_norm(model: torch.nn.Module) -> float:
    return sum(p.grad.square().sum() for p in model.parameters()).sqrt().item()


class TestLoss:
    def test_equals_one_computed_by_hand(self) -> None:
        model = build(pixel_teacher(mean=[0.0] * 3, std=[255.0] * 3))
        losses = losses_of(model, batch())
        inputs = model.data_preprocessor(batch())['inputs']
        student = model(inputs).detach().double().numpy()
        teacher = model.teacher.network(batch()['inputs'].float() / 255).double().numpy()

        def log_softmax(scores: np.ndarray) -> np.ndarray:
            return scores - np.log(np.exp(scores).sum(1, keepdims=True))

        log_s, log_t = log_softmax(student), log_softmax(teacher)
        divergence = (np.exp(log_t) * (log_t - log_s)).sum(1).mean()
        smoothed = np.eye(CLASSES)[np.arange(4) % CLASSES] * 0.9 + 0.1 / CLASSES
        assert list(losses) == ['loss_cls', 'loss_kd']
        assert divergence > 0.1
        assert losses['loss_kd'].item() == pytest.approx(5 * divergence, rel=1e-4)
        assert losses['loss_cls'].item() == pytest.approx(-(smoothed * log_s).sum(1).mean(), rel=1e-4)

        total, logged = model.parse_losses(losses)
        assert total.item() == pytest.approx(sum(v.item() for v in losses.values()))
        assert logged['loss'] == total

    def test_is_nothing_for_a_student_like_its_teacher(self, tmp_path: Path) -> None:
        model = build(write_teacher(tmp_path, CLASSES))
        assert losses_of(model, batch())['loss_kd'] > 0.1
        model.load_state_dict(torch.load(tmp_path / 'teacher.pth'))
        assert losses_of(model.eval(), batch())['loss_kd'].abs() < 1e-5

    def test_distill_weight_scales_the_loss(self) -> None:
        teacher = pixel_teacher()
        once, thrice = (losses_of(build(teacher, distill_weight=w), batch())['loss_kd'] for w in (1, 3))
        assert thrice.item() == pytest.approx(3 * once.item())

    def test_is_computed_in_float32_in_mixed_precision(self, tmp_path: Path) -> None:
        model = build(write_teacher(tmp_path, CLASSES))
        full = losses_of(model, batch())
        sum(full.values()).backward()
        norm = grad_norm(model)
        model.zero_grad()
        scores = []
        for network in (model.head, model.teacher.network):
            network.register_forward_hook(lambda module, inputs, output: scores.append(output))
        with torch.autocast('cpu', torch.bfloat16):
            mixed = losses_of(model, batch())
        sum(mixed.values()).backward()
        assert {s.dtype for s in scores} == {torch.bfloat16}
        student, teacher = (s.double().log_softmax(1) for s in scores[-2:])
        exact = 5 * (teacher.exp() * (teacher - student)).sum(1).mean()
        assert mixed['loss_kd'].item() == pytest.approx(exact.item(), rel=1e-5)  # the loss is not mixed
        for name, value in full.items():
            assert mixed[name].item() == pytest.approx(value.item(), rel=0.05)
        assert grad_norm(model) == pytest.approx(norm, rel=0.05)


class TestWhatTheTeacherSees:
    @pytest.mark.parametrize('config', KD_CONFIGS, ids=lambda path: path.stem)
    def test_teacher_of_the_configs_gets_plain_rgb(self, config: Path) -> None:
        preprocessor = Config.fromfile(config).model.teacher.data_preprocessor
        model = build(pixel_teacher(**preprocessor))
        losses_of(model, batch())
        plain = batch()['inputs'].flip(1) / 255
        assert torch.allclose(model.teacher.network.seen, plain, atol=1e-6)

    @pytest.mark.parametrize('to_rgb', [True, False])
    def test_student_that_normalises_nothing(self, to_rgb: bool) -> None:
        model = build(pixel_teacher(), data_preprocessor=dict(to_rgb=to_rgb))
        losses_of(model, batch())
        assert torch.equal(model.teacher.network.seen, batch()['inputs'].float())

    @pytest.mark.parametrize('side', [SIDE, 2 * SIDE])
    def test_images_are_resized_without_aliases(self, side: int) -> None:
        model = build(pixel_teacher(), size=28)
        data = batch(side=side)
        data['inputs'][:, :, ::2] = 0
        data['inputs'][:, :, 1::2] = 200
        losses_of(model, data)
        seen = model.teacher.network.seen
        assert seen.shape == (4, 3, 28, 28)
        assert (seen - 100).abs().max() < 20  # stripes of one pixel become grey

    def test_images_of_its_size_are_not_resized(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = build(pixel_teacher())
        monkeypatch.setattr('emo2_mm.distill.F.interpolate', None)
        losses_of(model, batch())
        assert model.teacher.network.seen.shape[-1] == SIDE


class TestTeacherIsOnlyAsked:
    @pytest.fixture
    def model(self, tmp_path: Path) -> DistilledImageClassifier:
        return build(write_teacher(tmp_path, CLASSES))

    @pytest.fixture
    def plain(self) -> ImageClassifier:
        torch.manual_seed(3)
        return MODELS.build(classifier(CLASSES))

    def test_it_is_no_part_of_the_model(
        self, model: DistilledImageClassifier, plain: ImageClassifier
    ) -> None:
        for kind in ('parameters', 'buffers', 'modules'):
            own, wanted = ([name for name, _ in getattr(m, f'named_{kind}')()] for m in (model, plain))
            assert own == wanted
        assert list(model.state_dict()) == list(plain.state_dict())

    def test_checkpoints_go_both_ways(self, model: DistilledImageClassifier, plain: ImageClassifier) -> None:
        plain.load_state_dict(model.state_dict(), strict=True)
        data = plain.data_preprocessor(batch())
        model.eval(), plain.eval()
        assert torch.equal(model(data['inputs']), plain(data['inputs']))
        other = MODELS.build(classifier(CLASSES))
        other.init_weights()
        model.load_state_dict(other.state_dict(), strict=True)
        assert torch.equal(model(data['inputs']), other.eval()(data['inputs']))
        scores = [m.predict(**data)[0].pred_score for m in (model, other)]
        assert torch.equal(*scores)

    def test_a_step_changes_the_student_alone(self, model: DistilledImageClassifier) -> None:
        teacher = model.teacher.network
        wrapper = build_optim_wrapper(model, dict(optimizer=dict(type='AdamW', lr=0.01)))
        optimised = {id(p) for group in wrapper.param_groups for p in group['params']}
        assert optimised == {id(p) for p in model.parameters()}
        before = deepcopy(teacher.state_dict()), deepcopy(model.state_dict())
        model.train()
        log = model.train_step(batch(), wrapper)
        assert log['loss'] == log['loss_cls'] + log['loss_kd']
        assert not teacher.training
        assert not any(module.training for module in teacher.modules())
        assert all(not p.requires_grad and p.grad is None for p in teacher.parameters())
        assert all(torch.equal(v, before[0][k]) for k, v in teacher.state_dict().items())
        changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[1][k])}
        assert changed == set(model.state_dict())

    def test_gradient_of_the_divergence_reaches_every_parameter(
        self, model: DistilledImageClassifier
    ) -> None:
        losses_of(model, batch())['loss_kd'].backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name

    def test_copies_and_averages_share_it(self, model: DistilledImageClassifier) -> None:
        copy = deepcopy(model)
        average = ExponentialMovingAverage(model, device=torch.device('cpu'))
        assert copy.teacher is average.module.teacher is model.teacher
        assert copy.head.fc.weight is not model.head.fc.weight
        assert not any('teacher' in name for name in average.state_dict())
        average.update_parameters(model)
        assert losses_of(copy, batch())['loss_kd'] == losses_of(model, batch())['loss_kd']

    def test_processes_exchange_nothing_of_it(self, model: DistilledImageClassifier) -> None:
        dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
        try:
            ddp = MMDistributedDataParallel(model, broadcast_buffers=True)
            sent = {id(t) for t in [*ddp._module_parameters, *ddp.modules_buffers]}
            assert {id(p) for p in model.parameters()} <= sent
            assert not sent & {id(t) for t in model.teacher.network.state_dict(keep_vars=True).values()}
            wrapper = build_optim_wrapper(ddp, dict(optimizer=dict(type='SGD', lr=0.01)))
            assert ddp.train_step(batch(), wrapper)['loss_kd'] > 0
        finally:
            dist.destroy_process_group()

    def test_it_follows_the_images(self, model: DistilledImageClassifier) -> None:
        scores = model.teacher(torch.zeros(2, 3, SIDE, SIDE, device='meta'))
        assert scores.is_meta and scores.shape == (2, CLASSES)
        assert next(model.teacher.network.parameters()).is_meta
        assert not any(p.is_meta for p in model.parameters())

    def test_evaluation_needs_none(self) -> None:
        student = dict(classifier(CLASSES), type='DistilledImageClassifier')
        model = MODELS.build(dict(student, teacher=dict(type='TimmClassifier', pretrained=True))).eval()
        assert len(model.test_step(batch())) == 4
        assert model.teacher.network is None


class TestWindows:
    def test_are_larger_in_training_where_the_config_says_so(self) -> None:
        model = build(pixel_teacher(), train_window_size=6)
        copy = deepcopy(model)

        def windows(network: DistilledImageClassifier) -> set[int]:
            return {m.window_size for m in network.modules() if isinstance(m, SEWMHSA)}

        assert windows(model) == {6}
        assert windows(model.eval()) == {4}
        assert windows(copy) == {6}
        plain = MODELS.build(classifier(CLASSES)).eval()
        plain.load_state_dict(model.state_dict())
        inputs = torch.rand(1, 3, 5 * SIDE, 5 * SIDE)
        assert torch.equal(model(inputs), plain(inputs))
        assert windows(model.train()) == {6}

    def test_are_the_backbones_otherwise(self) -> None:
        model = build(pixel_teacher())
        attentions = [m for m in model.modules() if isinstance(m, SEWMHSA)]
        assert {m.window_size for m in attentions} == {4}
        model.eval()
        assert {m.window_size for m in attentions} == {4}


class TestErrors:
    @pytest.mark.parametrize(
        ('teacher', 'kwargs', 'message'),
        [
            (classifier(CLASSES), {}, 'ImageClassifier has no trained weights.*teacher.pretrained'),
            (pixel_teacher(), dict(size=0), 'teacher_size is 0; give a positive number of pixels'),
            (pixel_teacher(), dict(train_window_size=0), 'train_window_size is 0; give a positive number'),
            (
                pixel_teacher(),
                dict(train_window_size=8, backbone=dict(type='ResNet', depth=18)),
                'train_window_size is 8; .* and an EMOv2',
            ),
        ],
        ids=['no weights', 'size', 'window', 'backbone'],
    )
    def test_a_wrong_argument_is_named(
        self, teacher: dict[str, Any], kwargs: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            build(teacher, **kwargs)

    def test_a_teacher_with_other_classes_is_refused(self) -> None:
        model = build(dict(pixel_teacher(), classes=4))
        message = 'PixelTeacher has 4 classes, the student 6; use a teacher with the same classes'
        with pytest.raises(ValueError, match=message):
            losses_of(model, batch())

    def test_a_missing_file_of_weights_is_named(self) -> None:
        message = '(?s)could not load teacher ImageClassifier: .*nowhere.pth.*model.teacher.pretrained=FILE'
        with pytest.raises(RuntimeError, match=message):
            build(dict(classifier(CLASSES), pretrained='nowhere.pth'))

    def test_weights_that_do_not_match_are_refused(self, tmp_path: Path) -> None:
        torch.save({'net': {}}, tmp_path / 'other.pth')
        with pytest.raises(RuntimeError, match='(?s)could not load teacher ImageClassifier: .*Missing key'):
            build(dict(classifier(CLASSES), pretrained=str(tmp_path / 'other.pth')))

    def test_weights_that_would_run_code_are_refused(self, tmp_path: Path) -> None:
        torch.save({'state_dict': {}, 'meta': BOMBS['posix.system'](tmp_path / 'ran')}, tmp_path / 'bomb.pth')
        with pytest.raises(RuntimeError, match='(?s)could not load teacher ImageClassifier: .*bomb.pth'):
            build(dict(classifier(CLASSES), pretrained=str(tmp_path / 'bomb.pth')))
        assert not (tmp_path / 'ran').exists()

    @pytest.fixture
    def timm_teacher(self) -> dict[str, Any]:
        pytest.importorskip('timm')
        return dict(type='TimmClassifier', model_name='test_resnet.r160_in1k', pretrained=True)

    def test_a_missing_timm_is_named(
        self, timm_teacher: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, 'timm.models', None)
        message = r'could not load teacher test_resnet.r160_in1k: .*\n.*install emo2_mm\[kd\]'
        with pytest.raises(RuntimeError, match=message):
            build(timm_teacher)

    def test_a_failed_download_names_the_remedy(
        self, timm_teacher: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        constants = pytest.importorskip('huggingface_hub').constants
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
        monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
        message = '(?s)could not load teacher test_resnet.r160_in1k: .*teacher.checkpoint_path=FILE'
        with pytest.raises(RuntimeError, match=message):
            build(timm_teacher)

    def test_a_file_replaces_the_download(self, timm_teacher: dict[str, Any], tmp_path: Path) -> None:
        timm = pytest.importorskip('timm')
        file = tmp_path / 'weights.pth'
        torch.manual_seed(4)
        network = timm.create_model('test_resnet.r160_in1k', num_classes=CLASSES)
        torch.save(network.state_dict(), file)
        timm_teacher.update(pretrained=False, checkpoint_path=str(file), num_classes=CLASSES)
        model = build(timm_teacher)
        assert losses_of(model, batch())['loss_kd'] > 0
        images = torch.rand(2, 3, SIDE, SIDE)
        assert torch.equal(model.teacher(images), network.eval()(images))

    def test_a_file_for_timm_runs_no_code(self, timm_teacher: dict[str, Any], tmp_path: Path) -> None:
        torch.save({'state_dict': {}, 'meta': BOMBS['posix.system'](tmp_path / 'ran')}, tmp_path / 'bomb.pth')
        timm_teacher.update(pretrained=False, checkpoint_path=str(tmp_path / 'bomb.pth'))
        with pytest.raises(
            RuntimeError, match='(?s)could not load teacher test_resnet.*: .*bomb.pth.*system is not on'
        ):
            build(timm_teacher)
        assert not (tmp_path / 'ran').exists()
