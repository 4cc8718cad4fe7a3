"""Analysis: parameters and multiply-adds, attention maps, training logs, timing, the environment.

``complexity`` needs MMEngine and the library of the config; ``training_log`` and ``attention_maps`` need
matplotlib.
"""
