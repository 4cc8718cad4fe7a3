"""Training and evaluation for the three libraries: config, checks before the start, resume, runner.

Needs MMEngine, and the library that a config's ``default_scope`` names (extras ``cls``, ``det``, ``seg``).
"""

from ..config import load_config, set_ranks
from ..errors import UserError, reported
from .evaluation import test
from .training import train

__all__ = ['UserError', 'load_config', 'reported', 'set_ranks', 'test', 'train']
