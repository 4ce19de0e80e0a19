"""Trains a stage: loop, feed, optimizer, checkpoints, metrics; and the base models of the small scales."""
