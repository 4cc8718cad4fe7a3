"""Make the demo's data: handwritten digits over photographs, for classification, detection and segmentation.

The 1,797 digits of 8 x 8 pixels are scikit-learn's, the photographs scikit-image's and scikit-learn's.
Training and validation share neither a digit nor a photograph.

    OUT/folders/{train,val}/DIGIT/*.jpg     images of one digit, for classification
    OUT/coco/{train,val}/*.jpg              scenes of several digits
    OUT/coco/annotations/{train,val}.json   their boxes and masks, for detection
    OUT/coco/maps/{train,val}/*.png         their label maps: 0 is background, 1 + d the convex hull
                                            of digit d: its strokes are thinner than a stride of 32
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as run_length
from rich.progress import track
from skimage import data as photographs
from sklearn.datasets import load_digits, load_sample_image

SCENE = 192  # pixels, the side of a detection scene
DIGIT = 48  # pixels, the side of a classification image
SIZES = (26, 84)  # pixels, the sides of a digit in a scene
DIMMED = 0.35  # brightness of a photograph behind digits
TRAIN_PHOTOS = ('astronaut', 'brick', 'camera', 'coffee', 'coins', 'grass', 'gravel', 'china.jpg')
VAL_PHOTOS = ('chelsea', 'moon', 'rocket', 'flower.jpg')


def load_photo(name: str) -> np.ndarray:
    """A photograph as (H, W, 3) uint8, RGB."""
    image = load_sample_image(name) if name.endswith('.jpg') else getattr(photographs, name)()
    image = image if image.ndim == 3 else np.stack([image] * 3, axis=-1)
    return image


def load_splits(seed: int) -> dict[str, dict[str, Any]]:
    """Digits (N, 8, 8) in 0..1, their labels and photographs of train and val; a fifth is val."""
    digits = load_digits()
    order = np.random.RandomState(seed).permutation(len(digits.images))
    val = len(order) // 5
    return {
        split: dict(
            digits=digits.images[chosen] / 16,
            labels=digits.target[chosen],
            photos=[load_photo(name) for name in photos],
        )
        for split, chosen, photos in (
            ('train', order[val:], TRAIN_PHOTOS),
            ('val', order[:val], VAL_PHOTOS),
        )
    }


def draw_background(photos: list[np.ndarray], side: int, rng: np.random.RandomState) -> np.ndarray:
    """A random dimmed crop of a photograph, (side, side, 3) float."""
    photo = photos[rng.randint(len(photos))]
    crop = min(rng.randint(side, 2 * side), *photo.shape[:2])
    y, x = (rng.randint(n - crop + 1) for n in photo.shape[:2])
    image = cv2.resize(photo[y : y + crop, x : x + crop], (side, side), interpolation=cv2.INTER_AREA)
    return image * DIMMED


def draw_glyph(digit: np.ndarray, side: int, rng: np.random.RandomState) -> np.ndarray:
    """A digit as opacity (side, side) in 0..1, slightly turned, cropped to its visible part."""
    big = cv2.resize(np.pad(digit, 2), (2 * side, 2 * side), interpolation=cv2.INTER_CUBIC)
    turn = cv2.getRotationMatrix2D((side - 0.5, side - 0.5), rng.uniform(-12, 12), 1.0)
    big = cv2.warpAffine(big, turn, big.shape)
    # the strokes of 8 x 8 pixels are blurred: sharpen their edges
    big = np.clip((big - 0.25) / 0.3, 0, 1)
    ys, xs = np.where(big > 0.5)
    big = big[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    scale = side / max(big.shape)
    size = [max(1, round(n * scale)) for n in big.shape[::-1]]
    return cv2.resize(big, tuple(size), interpolation=cv2.INTER_AREA)


def bright_colour(rng: np.random.RandomState) -> np.ndarray:
    hsv = np.uint8([[[rng.randint(180), rng.randint(100, 256), 255]]])
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0].astype(float)


def paste(image: np.ndarray, glyph: np.ndarray, y: int, x: int, rng: np.random.RandomState) -> None:
    h, w = glyph.shape
    window = image[y : y + h, x : x + w]
    window += glyph[..., None] * (bright_colour(rng) - window)


def make_scene(
    split: dict[str, Any], rng: np.random.RandomState
) -> tuple[np.ndarray, list[dict[str, Any]], np.ndarray]:
    """A scene of two to five digits that do not touch, its annotations in COCO's terms and its map."""
    image = draw_background(split['photos'], SCENE, rng)
    taken = np.zeros((SCENE, SCENE), bool)
    semantic = np.zeros((SCENE, SCENE), np.uint8)
    annotations = []
    for _ in range(rng.randint(2, 6)):
        index = rng.randint(len(split['labels']))
        side = int(np.exp(rng.uniform(*np.log(SIZES))))
        glyph = draw_glyph(split['digits'][index], side, rng)
        h, w = glyph.shape
        y, x = rng.randint(SCENE - h + 1), rng.randint(SCENE - w + 1)
        if taken[y : y + h, x : x + w].any():
            continue
        taken[y : y + h, x : x + w] = True
        paste(image, glyph, y, x, rng)
        mask = np.zeros((SCENE, SCENE), np.uint8, order='F')
        mask[y : y + h, x : x + w] = glyph > 0.5
        category = int(split['labels'][index]) + 1
        hull = cv2.convexHull(cv2.findNonZero(mask))
        cv2.fillConvexPoly(semantic, hull, category)
        # not polygons, which would fill the holes of 0, 6, 8 and 9
        encoded = run_length.encode(mask)
        annotations.append(
            dict(
                category_id=category,
                bbox=[x, y, w, h],
                area=int(mask.sum()),
                iscrowd=0,
                segmentation=dict(size=encoded['size'], counts=encoded['counts'].decode()),
            )
        )
    return image, annotations, semantic


def save(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image.round().astype(np.uint8)[..., ::-1])


def make_detection(out: Path, name: str, split: dict[str, Any], count: int, seed: int) -> None:
    """Scenes, their annotation file in COCO's format, and their maps."""
    rng = np.random.RandomState(seed)
    coco: dict[str, Any] = dict(
        info=dict(description='scikit-learn digits over photographs'),
        categories=[dict(id=i + 1, name=str(i)) for i in range(10)],
        images=[],
        annotations=[],
    )
    (out / 'maps' / name).mkdir(parents=True)
    for i in track(range(count), f'scenes, {name}'):
        image, annotations, semantic = make_scene(split, rng)
        file = f'{i:05d}.jpg'
        save(out / name / file, image)
        cv2.imwrite(str(out / 'maps' / name / f'{i:05d}.png'), semantic)
        coco['images'].append(dict(id=i, file_name=file, width=SCENE, height=SCENE))
        for annotation in annotations:
            coco['annotations'].append(dict(id=len(coco['annotations']) + 1, image_id=i, **annotation))
    (out / 'annotations').mkdir(exist_ok=True)
    (out / 'annotations' / f'{name}.json').write_text(json.dumps(coco))


def make_classification(out: Path, name: str, split: dict[str, Any], copies: int, seed: int) -> None:
    """One folder a class; every digit in some colours, sizes and places."""
    rng = np.random.RandomState(seed)
    for i in track(range(len(split['labels'])), f'digits, {name}'):
        for copy in range(copies):
            image = draw_background(split['photos'], DIGIT, rng)
            glyph = draw_glyph(split['digits'][i], rng.randint(DIGIT // 2, DIGIT - 3), rng)
            y, x = (rng.randint(DIGIT - n + 1) for n in glyph.shape)
            paste(image, glyph, y, x, rng)
            save(out / name / str(split['labels'][i]) / f'{i:04d}_{copy}.jpg', image)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('out', type=Path, help='folder whose `coco/` and `folders/` are replaced')
    parser.add_argument('--scenes', type=int, default=2400, help='training scenes')
    parser.add_argument('--val-scenes', type=int, default=200, help='validation scenes')
    parser.add_argument('--copies', type=int, default=4, help='images of a training digit')
    parser.add_argument('--seed', type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    splits = load_splits(args.seed)
    part = args.out.with_name(args.out.name + '.part')  # coco/ and folders/ are replaced when complete
    shutil.rmtree(part, ignore_errors=True)
    for name, scenes, copies, seed in (
        ('train', args.scenes, args.copies, args.seed + 1),
        ('val', args.val_scenes, 1, args.seed + 2),
    ):
        make_detection(part / 'coco', name, splits[name], scenes, seed)
        make_classification(part / 'folders', name, splits[name], copies, seed + 2)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in ('coco', 'folders'):
        shutil.rmtree(args.out / name, ignore_errors=True)
        (part / name).rename(args.out / name)
    part.rmdir()
    print(f'{args.out}: {args.scenes} + {args.val_scenes} scenes, digits in folders')


if __name__ == '__main__':
    main()
