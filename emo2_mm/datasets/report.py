"""What can be wrong with a dataset, with a short code each, and what training and evaluation do with it.

Training, evaluation and ``tools/check_dataset.py`` share this table: a finding of level ``error`` ends
training before its first step or at the file, and one of level ``warning`` is told once and repaired, dropped
or kept as its effect says.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any, Iterable, NamedTuple

from mmengine.logging import print_log

from ..errors import UserError, note, printable

ERROR, WARNING = 'error', 'warning'


class Kind(NamedTuple):
    """A kind of finding: level, what it is, and what training does with it (an error: the remedy)."""

    level: str
    title: str
    effect: str


DROPPED = 'training drops the box and says how many; evaluation counts it as a missed object'
NAMED = 'training stops and names the file'
KINDS: dict[str, Kind] = {
    # images of any dataset
    'IMG001': Kind(ERROR, 'image is missing', 'training stops and names the file'),
    'IMG002': Kind(ERROR, 'image is empty', NAMED),
    'IMG003': Kind(ERROR, 'image is damaged', NAMED),
    'IMG004': Kind(ERROR, 'image is of a kind that OpenCV does not read', f'{NAMED}; convert it to PNG'),
    'IMG005': Kind(
        ERROR, 'image is truncated, but loaded', 'training reads undefined pixels where data is lost'
    ),
    'IMG006': Kind(ERROR, 'dataset holds no images', 'training stops'),
    'IMG007': Kind(ERROR, 'images cannot be listed', 'training stops with the same error'),
    'IMG011': Kind(WARNING, 'image is grey', 'training takes it as three equal channels'),
    'IMG012': Kind(WARNING, 'image has an alpha channel', 'training drops alpha: colours below it show'),
    'IMG013': Kind(WARNING, 'image has 16 bits a channel', 'training takes the upper 8 bits (value // 256)'),
    'IMG014': Kind(
        WARNING,
        'image is 1 pixel wide or tall',
        'training stretches it, or stops where Resize makes a side 0; detection drops it below '
        'filter_cfg.min_size',
    ),
    'IMG015': Kind(
        WARNING,
        'image is listed twice',
        'training takes it as often, each time with the labels of that entry',
    ),
    'IMG016': Kind(WARNING, 'images in two folders have one name', '`tools/test.py --out` writes one file'),
    'IMG017': Kind(WARNING, 'file is no image that can be read', 'not loaded'),
    'IMG018': Kind(
        WARNING,
        'image has an EXIF orientation',
        'training loads it as it is displayed: labels have to refer to the displayed pixels',
    ),
    # annotation files in COCO's format
    'COCO001': Kind(ERROR, 'annotation file is not JSON', 'export it again'),
    'COCO002': Kind(
        ERROR,
        'annotation file lacks a key or has an unusable value',
        'correct the entry, or delete it',
    ),
    'COCO003': Kind(ERROR, 'image id occurs twice', 'give each image an id of its own'),
    'COCO004': Kind(ERROR, 'category id occurs twice', 'give each category an id of its own'),
    'COCO005': Kind(
        ERROR,
        'category id of an annotation is not among the categories',
        'add the category, or correct the id',
    ),
    'COCO006': Kind(
        ERROR,
        'no class of the config is in the file',
        "name the file's categories in the config: metainfo=dict(classes=(...)) of the datasets",
    ),
    'COCO007': Kind(
        ERROR,
        'width and height are not those of the image',
        'boxes may refer to another size of the image: export the annotations again',
    ),
    'COCO008': Kind(
        ERROR,
        'boxes look like corners (left, top, right, bottom)',
        "COCO's are [left, top, width, height]: subtract left and top from the others",
    ),
    'COCO009': Kind(
        ERROR,
        'boxes look like shares of the image (0 to 1)',
        "COCO's are in pixels: multiply them by its size",
    ),
    'COCO010': Kind(
        ERROR, 'mask is missing', 'the config trains masks: add them, or use a config that needs boxes only'
    ),
    'COCO011': Kind(ERROR, 'mask cannot be read', 'correct or delete the annotation'),
    'COCO012': Kind(ERROR, 'mask has numbers beyond 1e6 or not finite', 'correct or delete the annotation'),
    'COCO013': Kind(
        ERROR, 'mask (RLE) is of another size than its image', 'size has to be [height, width] of the image'
    ),
    'COCO014': Kind(
        ERROR,
        'images are annotated partly with, partly without their EXIF orientation',
        'rotate the pixels for good and export the annotations again',
    ),
    'COCO021': Kind(
        WARNING, 'annotation file is not in plain UTF-8', 'read in the encoding of its byte order mark'
    ),
    'COCO022': Kind(WARNING, 'annotation has no iscrowd', 'taken as 0'),
    'COCO023': Kind(WARNING, 'all objects are marked iscrowd', 'a crowd is ignored: taken as single objects'),
    'COCO024': Kind(
        WARNING, 'all objects of a class are marked iscrowd', 'they are ignored: nothing is learned'
    ),
    'COCO025': Kind(WARNING, 'annotation has no area', 'computed from the mask, else from the box'),
    'COCO026': Kind(WARNING, 'annotation ids are missing, 0 or not unique', 'numbered from 1'),
    'COCO027': Kind(WARNING, 'ids are texts or fractions', 'taken as numbers'),
    'COCO028': Kind(WARNING, 'category name is no text', 'taken as text'),
    'COCO029': Kind(WARNING, 'category name has blanks around it', 'taken without'),
    'COCO030': Kind(WARNING, 'root category without boxes', 'no class: left out'),
    'COCO031': Kind(WARNING, 'categories have the same name', 'taken as one class'),
    'COCO032': Kind(WARNING, 'class of the config is not in the file', 'the class has no boxes there'),
    'COCO033': Kind(WARNING, 'category is no class of the config', 'its boxes are dropped'),
    'COCO034': Kind(WARNING, 'class has no boxes', 'it cannot be learned or evaluated there'),
    'COCO035': Kind(WARNING, 'annotation is of an unknown image', 'dropped'),
    'COCO036': Kind(WARNING, 'annotation occurs twice', 'the copy is dropped'),
    'COCO037': Kind(WARNING, 'annotation has no box', 'computed from its mask'),
    'COCO038': Kind(WARNING, 'numbers of a box are texts', 'taken as numbers'),
    'COCO039': Kind(WARNING, 'box is not finite', 'dropped'),
    'COCO040': Kind(WARNING, 'box has a negative width or height', 'drawn backwards: turned round'),
    'COCO041': Kind(WARNING, 'mask is one flat list', 'taken as one polygon'),
    'COCO042': Kind(WARNING, 'mask (RLE) has width and height swapped', 'turned round, it fits its box'),
    'COCO043': Kind(WARNING, 'file name differs from that on disk', 'the file on disk is taken'),
    'COCO044': Kind(WARNING, 'width and height are missing or swapped', 'taken from the image'),
    'COCO045': Kind(WARNING, 'image is listed twice under one id', 'the copy is dropped'),
    'COCO046': Kind(
        WARNING,
        'images are annotated without their EXIF orientation',
        'training loads them as they are stored',
    ),
    'COCO051': Kind(WARNING, 'image has no annotations', 'training takes it as background'),
    'COCO052': Kind(
        WARNING,
        'image has no annotations, and is dropped',
        'training never sees it (filter_cfg.filter_empty_gt), and says how many',
    ),
    'COCO053': Kind(
        WARNING, 'image is smaller than filter_cfg.min_size', 'training never sees it, and says how many'
    ),
    'COCO054': Kind(ERROR, 'box has no area', DROPPED),
    'COCO055': Kind(ERROR, 'box is outside its image', DROPPED),
    'COCO056': Kind(WARNING, 'box is less than 1 pixel wide or tall', DROPPED),
    'COCO057': Kind(
        WARNING,
        'box is partly outside its image',
        'Resize after LoadAnnotations cuts it to the image, else it is kept',
    ),
    'COCO058': Kind(WARNING, 'mask has no polygon of three points', 'training drops the object'),
    'COCO059': Kind(WARNING, 'mask has polygons of less than three points', 'training drops these polygons'),
    # maps of segmentation
    'SEG001': Kind(ERROR, 'map is missing', NAMED),
    'SEG002': Kind(ERROR, 'map cannot be read', NAMED),
    'SEG003': Kind(
        ERROR,
        'map has colours or alpha',
        'a map has one channel of class numbers: tools/convert_dataset.py converts colours',
    ),
    'SEG004': Kind(ERROR, 'map is 1 pixel wide or tall', 'MMSegmentation squeezes that dimension away'),
    'SEG005': Kind(ERROR, 'map is of another size than its image', 'training stops and names both'),
    'SEG006': Kind(ERROR, 'map has values beyond 0..255', 'training takes them modulo 256, as other classes'),
    'SEG007': Kind(ERROR, 'map has values that are no class', 'add the classes, or correct the maps'),
    'SEG008': Kind(ERROR, 'maps hold 255 only, which is no class', 'draw the classes as 0, 1, 2 ...'),
    'SEG021': Kind(WARNING, 'map has no image', 'training never sees it'),
    'SEG022': Kind(WARNING, 'class has no pixel', 'it cannot be learned or evaluated there'),
    'SEG023': Kind(
        WARNING, 'maps hold other numbers than the classes', 'mapped as the dataset says (label_map)'
    ),
    'SEG024': Kind(
        WARNING,
        'maps are drawn without the EXIF orientation of images',
        'images are loaded as they are stored',
    ),
    # folders of classes
    'CLS001': Kind(
        ERROR, 'label is no class of the head', 'training stops (on a CPU: IndexError or the like)'
    ),
    'CLS021': Kind(
        WARNING,
        'folders are fewer than classes of the head',
        'labels after a folder that is missing are one too low',
    ),
    'CLS022': Kind(WARNING, 'class folder holds no images', 'its label never occurs'),
}
_told: set[str] = set()  # several parts of a program read one file


class Report:
    """Findings of each kind, with their places.

    Attributes:
        found: code of :data:`KINDS` -> places, such as ``FILE: annotation 3``.
    """

    def __init__(self) -> None:
        self.found: dict[str, list[str]] = defaultdict(list)

    def add(self, code: str, *places: str) -> None:
        """Add places of one kind."""
        if places:
            self.found[code].extend(places)

    def of(self, level: str) -> list[str]:
        """Codes of the findings of a level, in the order of the table."""
        return [code for code, kind in KINDS.items() if kind.level == level and self.found.get(code)]

    def summary(self, code: str) -> str:
        """One line on all findings of a kind."""
        places, (_, title, effect) = self.found[code], KINDS[code]
        more = f' ({len(places)}, such as this)' if len(places) > 1 else ''
        return f'{places[0]}: {title}{more}: {effect} [{code}]'

    def raise_errors(self) -> None:
        """Raise if anything was found that cannot be used.

        Raises:
            UserError: Names the first place, the number, and the remedy of each kind.
        """
        lines = [self.summary(code) for code in self.of(ERROR)]
        if lines:
            raise UserError('\n'.join(lines))

    def tell(self, log: bool = False) -> None:
        """Print a line for each kind of warning, once in a process.

        Args:
            log: Write to the current log, which a runner has made, else print.
        """
        for code in self.of(WARNING):
            line = printable(self.summary(code))
            if line in _told:
                continue
            _told.add(line)
            if log:
                print_log(line, 'current')
            else:
                note(line)

    def show(self, max_shown: int) -> int:
        """Print all findings, errors first; return how many errors there are."""
        totals = []
        for level in (ERROR, WARNING):
            totals.append(sum(len(self.found[code]) for code in self.of(level)))
            for code in self.of(level):
                places = self.found[code]
                print(f'\n{level} {code}: {KINDS[code].title} ({len(places)})\n  {KINDS[code].effect}')
                print(*(f'    {printable(place)}' for place in places[:max_shown]), sep='\n')
                if len(places) > max_shown:
                    print(f'    and {len(places) - max_shown} more')
        print(f'\n{totals[0]} errors, {totals[1]} warnings')
        return totals[0]


def repeated(names: Iterable[Any]) -> list[Any]:
    """Names that occur more than once."""
    return [name for name, count in Counter(names).items() if count > 1]
