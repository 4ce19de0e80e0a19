"""Measurements that print tables, write JSON and hold figures to bounds. `longvila bench NAME`."""
