"""fastbeit: pre-training of BEiT (arXiv 2106.08254), fast and checked.

``torchrun -m fastbeit.pretrain`` trains; ``python -m fastbeit.doctor`` says what will run and why.
Importing this package queries no GPU and imports neither DALI nor xformers nor apex.
"""

__version__ = "0.1.0"
