"""Webdataset shards: written from sources, streamed, mixed, packed into rows, resumed. Knows no model."""

from longvila.shards.bad import BadSamples
from longvila.shards.loader import RowLoader
from longvila.shards.rows import Row
from longvila.shards.sample import BadRecord, Sample, SourceSample
from longvila.shards.write import PackReport, write_shards

__all__ = ["BadRecord", "BadSamples", "PackReport", "Row", "RowLoader", "Sample", "SourceSample", "write_shards"]
