"""What the packages of this repository share about running experiments; nothing about any one method.

Import the module you need (`from expkit.config import load_config`). `errors`, `config`, `metrics` and `cli`
do not import torch, so a command line built on them answers `--help` at once.
"""
