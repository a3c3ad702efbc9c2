"""Data of the experts.

sources.py   lists pictures and captions where people keep them
pictures.py  decodes and resizes a picture
cache.py     encodes a source, once, into a cache on the disk
shards.py    the files of a cache
pairs.py     draws training and held-out pairs from a cache
tensors.py   draws pairs from tensors in memory
"""
