"""One process and two train alike: same global batch, same losses, DropPath on."""

import pytest

FLAGS = [
    "--steps=50",
    "--model.drop-path=0.3",
    "--model.layer-scale=0.1",
    "--model.position=relative",
    "--checkpoint-every=100",
    "--warmup-steps=10",
]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 1e-3)])
def test_losses_do_not_depend_on_the_number_of_ranks(run, other_run, precision, tolerance):
    run.finish(*FLAGS, f"--precision={precision}")
    other_run.finish(*FLAGS, f"--precision={precision}", ranks=2)
    assert len(run.losses) == 50
    assert other_run.losses == pytest.approx(run.losses, rel=tolerance)


def test_accumulation_keeps_the_global_batch(run, other_run):
    run.finish(*FLAGS, "--steps=10", ranks=None)
    done = other_run.finish(*FLAGS, "--steps=10", "--micro-batch=8", ranks=None)
    assert "4 accumulation steps" in done.stdout
    assert other_run.losses == pytest.approx(run.losses, rel=1e-5)
