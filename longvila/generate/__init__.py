"""Inference: answers about frames, and captions of video files."""
