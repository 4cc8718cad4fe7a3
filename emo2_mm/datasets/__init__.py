"""Custom datasets: config from a folder, checks before training, errors that name the file.

Needs MMEngine; the checks also need MMCV, OpenCV and the library of the config (extras ``cls``, ``det``,
``seg``).
"""
