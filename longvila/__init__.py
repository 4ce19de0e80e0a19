"""Train and run vision-language models on long videos, with exact sequence parallelism.

Importing this package imports nothing heavy; the folders beside this file are imported when they are needed.
"""

from importlib.metadata import version

__version__ = version("longvila")
