"""Inference: answers about frames and captions of video files, by one process or ranks that share each prompt."""
