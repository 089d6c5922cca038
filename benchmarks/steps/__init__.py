"""Whole models and whole steps, ready to run: ours, its reference twin, and those of others.

All contestants start from the same weights, images, masks and tokens of a `Problem`, on any device.
Nothing here waits for a device except where a contestant's own code does.
"""
