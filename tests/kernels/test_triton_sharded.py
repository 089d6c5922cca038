"""FSDP2 over the Triton operators: the gradients of one process, and a bias gradient in fp32."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

WORKER = Path(__file__).with_name("sharded_worker.py")


@pytest.mark.skipif(torch.cuda.is_available(), reason="interprets the kernels on gloo ranks")
def test_two_ranks_give_the_gradients_of_one(run_python, repo_root, tmp_path) -> None:
    paths = f"{repo_root}:{repo_root / 'kernels'}"
    run_python(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *(WORKER, tmp_path),
        env={"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "PYTHONPATH": paths},
        timeout_s=240,
    )
    records = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    for record in records:
        assert set(record["errors"]) == {"table.weight"} | {
            f"blocks.{block}.{layer}.{kind}"
            for block in (0, 1)
            for layer in ("qkv", "proj")
            for kind in ("weight", "bias")
        }
        # The same products in the same order; only the mean over ranks may round differently.
        assert all(error < 1e-6 for error in record["errors"].values()), record["errors"]
        assert record["bias_gradient_dtype"] == "torch.float32"
        assert record["bias_gradient_equal"] and not record["bias_gradient_survives_bf16"]
