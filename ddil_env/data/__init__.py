"""Data of the experts.

sources.py   lists pictures and captions where people keep them; coco.py and webdataset.py read two of the formats
files.py     a pair of a picture and a caption, and the walk of a folder in which nothing is passed over
captions.py  what counts as a text
pictures.py  decodes and resizes a picture
hashes.py    hashes the pictures' files
cache.py     encodes a source, once, into a cache on the disk, and what changed in it later; encoding.py computes the rows
shards.py    the files of a cache
pairs.py     draws training and held-out pairs from a cache
tensors.py   draws pairs from tensors in memory
"""
