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
ERRORS = {
    # images of any dataset
    'IMG001': ('image is missing', NAMED),
    'IMG002': ('image is empty', NAMED),
    'IMG003': ('image is damaged', NAMED),
    'IMG004': ('image is of a kind that OpenCV does not read', f'{NAMED}; convert it to PNG'),
    'IMG005': ('image is truncated, but loaded', 'training reads undefined pixels where data is lost'),
    'IMG006': ('dataset holds no images', 'training stops'),
    'IMG007': ('images cannot be listed', 'training stops with the same error'),
    # annotation files in COCO's format
    'COCO001': ('annotation file is not JSON', 'export it again'),
    'COCO002': ('annotation file lacks a key or has an unusable value', 'correct the entry, or delete it'),
    'COCO003': ('image id occurs twice', 'give each image an id of its own'),
    'COCO004': ('category id occurs twice', 'give each category an id of its own'),
    'COCO005': (
        'category id of an annotation is not among the categories',
        'add the category, or correct the id',
    ),
    'COCO006': (
        'no class of the config is in the file',
        "name the file's categories in the config: metainfo=dict(classes=(...)) of the datasets",
    ),
    'COCO007': (
        'width and height are not those of the image',
        'boxes may refer to another size of the image: export the annotations again',
    ),
    'COCO008': (
        'boxes look like corners (left, top, right, bottom)',
        "COCO's are [left, top, width, height]: subtract left and top from the others",
    ),
    'COCO009': (
        'boxes look like shares of the image (0 to 1)',
        "COCO's are in pixels: multiply them by its size",
    ),
    'COCO010': (
        'mask is missing',
        'the config trains masks: add them, or use a config that needs boxes only',
    ),
    'COCO011': ('mask cannot be read', 'correct or delete the annotation'),
    'COCO012': ('mask has numbers beyond 1e6 or not finite', 'correct or delete the annotation'),
    'COCO013': (
        'mask (RLE) is of another size than its image',
        'size has to be [height, width] of the image',
    ),
    'COCO014': (
        'images are annotated partly with, partly without their EXIF orientation',
        'rotate the pixels for good and export the annotations again',
    ),
    'COCO054': ('box has no area', DROPPED),
    'COCO055': ('box is outside its image', DROPPED),
    # maps of segmentation
    'SEG001': ('map is missing', NAMED),
    'SEG002': ('map cannot be read', NAMED),
    'SEG003': (
        'map has colours or alpha',
        'a map has one channel of class numbers: tools/convert_dataset.py converts colours',
    ),
    'SEG004': ('map is 1 pixel wide or tall', 'MMSegmentation squeezes that dimension away'),
    'SEG005': ('map is of another size than its image', 'training stops and names both'),
    'SEG006': ('map has values beyond 0..255', 'training takes them modulo 256, as other classes'),
    'SEG007': ('map has values that are no class', 'add the classes, or correct the maps'),
    'SEG008': ('maps hold 255 only, which is no class', 'draw the classes as 0, 1, 2 ...'),
    # folders of classes
    'CLS001': ('label is no class of the head', 'training stops (on a CPU: IndexError or the like)'),
}
WARNINGS = {
    # images of any dataset
    'IMG011': ('image is grey', 'training takes it as three equal channels'),
    'IMG012': ('image has an alpha channel', 'training drops alpha: colours below it show'),
    'IMG013': ('image has 16 bits a channel', 'training takes the upper 8 bits (value // 256)'),
    'IMG014': (
        'image is 1 pixel wide or tall',
        'training stretches it, or stops where Resize makes a side 0; detection drops it below '
        'filter_cfg.min_size',
    ),
    'IMG015': (
        'image is listed twice',
        'training takes it as often, each time with the labels of that entry',
    ),
    'IMG016': ('images in two folders have one name', '`tools/test.py --out` writes one file'),
    'IMG017': ('file is no image that can be read', 'not loaded'),
    'IMG018': (
        'image has an EXIF orientation',
        'training loads it as it is displayed: labels have to refer to the displayed pixels',
    ),
    # annotation files in COCO's format
    'COCO021': ('annotation file is not in plain UTF-8', 'read in the encoding of its byte order mark'),
    'COCO022': ('annotation has no iscrowd', 'taken as 0'),
    'COCO023': ('all objects are marked iscrowd', 'a crowd is ignored: taken as single objects'),
    'COCO024': ('all objects of a class are marked iscrowd', 'they are ignored: nothing is learned'),
    'COCO025': ('annotation has no area', 'computed from the mask, else from the box'),
    'COCO026': ('annotation ids are missing, 0 or not unique', 'numbered from 1'),
    'COCO027': ('ids are texts or fractions', 'taken as numbers'),
    'COCO028': ('category name is no text', 'taken as text'),
    'COCO029': ('category name has blanks around it', 'taken without'),
    'COCO030': ('root category without boxes', 'no class: left out'),
    'COCO031': ('categories have the same name', 'taken as one class'),
    'COCO032': ('class of the config is not in the file', 'the class has no boxes there'),
    'COCO033': ('category is no class of the config', 'its boxes are dropped'),
    'COCO034': ('class has no boxes', 'it cannot be learned or evaluated there'),
    'COCO035': ('annotation is of an unknown image', 'dropped'),
    'COCO036': ('annotation occurs twice', 'the copy is dropped'),
    'COCO037': ('annotation has no box', 'computed from its mask'),
    'COCO038': ('numbers of a box are texts', 'taken as numbers'),
    'COCO039': ('box is not finite', 'dropped'),
    'COCO040': ('box has a negative width or height', 'drawn backwards: turned round'),
    'COCO041': ('mask is one flat list', 'taken as one polygon'),
    'COCO042': ('mask (RLE) has width and height swapped', 'turned round, it fits its box'),
    'COCO043': ('file name differs from that on disk', 'the file on disk is taken'),
    'COCO044': ('width and height are missing or swapped', 'taken from the image'),
    'COCO045': ('image is listed twice under one id', 'the copy is dropped'),
    'COCO046': (
        'images are annotated without their EXIF orientation',
        'training loads them as they are stored',
    ),
    'COCO051': ('image has no annotations', 'training takes it as background'),
    'COCO052': (
        'image has no annotations, and is dropped',
        'training never sees it (filter_cfg.filter_empty_gt), and says how many',
    ),
    'COCO053': ('image is smaller than filter_cfg.min_size', 'training never sees it, and says how many'),
    'COCO056': ('box is less than 1 pixel wide or tall', DROPPED),
    'COCO057': (
        'box is partly outside its image',
        'Resize after LoadAnnotations cuts it to the image, else it is kept',
    ),
    'COCO058': ('mask has no polygon of three points', 'training drops the object'),
    'COCO059': ('mask has polygons of less than three points', 'training drops these polygons'),
    # maps of segmentation
    'SEG021': ('map has no image', 'training never sees it'),
    'SEG022': ('class has no pixel', 'it cannot be learned or evaluated there'),
    'SEG023': ('maps hold other numbers than the classes', 'mapped as the dataset says (label_map)'),
    'SEG024': (
        'maps are drawn without the EXIF orientation of images',
        'images are loaded as they are stored',
    ),
    # folders of classes
    'CLS021': (
        'folders are fewer than classes of the head',
        'labels after a folder that is missing are one too low',
    ),
    'CLS022': ('class folder holds no images', 'its label never occurs'),
}
KINDS = {  # by code
    **{code: Kind(ERROR, *texts) for code, texts in ERRORS.items()},
    **{code: Kind(WARNING, *texts) for code, texts in WARNINGS.items()},
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
