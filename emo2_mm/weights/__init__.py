"""Read, load and save weights: released files and checkpoints of OpenMMLab, as data.

Needs torch and MMEngine; files of safetensors also need the package ``safetensors``.
"""

from .load import classifier_state_dict, find_arch, find_state_dict, load_backbone_weights, match_weights
from .read import read_checkpoint
from .save import write_weights

__all__ = [
    'classifier_state_dict',
    'find_arch',
    'find_state_dict',
    'load_backbone_weights',
    'match_weights',
    'read_checkpoint',
    'write_weights',
]
