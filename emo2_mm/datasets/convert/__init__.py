"""Convert datasets of other formats into what the custom configs read; see :func:`convert_dataset`.

Read are COCO, YOLO (boxes and segments), Pascal VOC, LabelMe, CVAT XML, images with masks in colours or
numbers, and folders of classes. The parsers are own ones: of the libraries that read such formats, datumaro
(1.13) needs NumPy 2.2, Python 3.10, pandas and pyarrow, which the classic stack (NumPy below 2, Python 3.8)
cannot have; supervision (0.31) needs Python 3.10, PyAV and SciPy, and reads neither LabelMe nor CVAT. Neither
counts what it leaves out, which is half of what a conversion has to say.

Importing this package is cheap: torch and the libraries are not needed.
"""

from .convert import CONFIGS, convert_dataset, split_dataset
from .recognise import FORMATS, recognise

__all__ = ['CONFIGS', 'FORMATS', 'convert_dataset', 'recognise', 'split_dataset']
