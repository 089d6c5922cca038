"""Everything a GPU can tell about the kernels, in one command. See `__main__`."""
