"""The masked loss of a linear head in Triton.

Kernels gather the masked rows, take loss and gradient over the logits in place, and scatter the
rows' gradient; the three products (logits, dX, dW; ``run.py``) are cuBLAS's, 6 R D V operations
together: at R = 75 * 128 rows, D = 768, V = 8192 these are 362 GFLOP, 0.45 ms of an H100 at the
798 TFLOP/s that its products reach, which is most of the head's time.
"""
