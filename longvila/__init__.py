"""Train and run vision-language models on long videos, with exact sequence parallelism.

Importing this package imports nothing heavy; the folders beside this file are imported when they are needed. It does
make the architecture known to transformers: after `import longvila`, `AutoModel.from_pretrained` loads its models.
"""

from importlib.metadata import version

from longvila.registration import register_with_transformers

__version__ = version("longvila")

register_with_transformers()
