"""What the model fills in: a few images, their masks, and tokens turned back into pictures.

Computed once, at the end of training, and kept in ``report_samples.npz`` together with the versions
of the machine that trained, so that the page can be rendered again anywhere, without the model.
Shapes: B images, C channels, N = h x w patches, M mask slots.
"""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import fastbeit
from fastbeit.batch import MimBatch

SAMPLES_FILE = "report_samples.npz"


class ReportSamples(NamedTuple):
    """Pictures as uint8 ``[B, H, W, C]``, the numbers behind them, and where they were made.

    Attributes:
        images: what the student sees, without the mask.
        positions: ``[B, M]`` masked patches, -1 in empty slots.
        tokens: ``[B, N]`` the tokenizer's codes of the whole image.
        predicted: ``[B, M]`` the model's most likely codes at the positions.
        from_tokens: the tokenizer's drawing of its own codes, or None without a decoder.
        from_predicted: the same with the predicted codes at the masked patches, or None.
        grid: patches down and across.
        names: what each sample is called.
        environment: versions and device of the machine that made them.
    """

    images: np.ndarray
    positions: np.ndarray
    tokens: np.ndarray
    predicted: np.ndarray
    from_tokens: np.ndarray | None
    from_predicted: np.ndarray | None
    grid: tuple[int, int]
    names: list[str]
    environment: dict[str, str]

    @property
    def masked(self) -> np.ndarray:
        """``[B]`` masked patches of each image."""
        return (self.positions >= 0).sum(1)

    @property
    def right(self) -> np.ndarray:
        """``[B]`` masked patches whose token was predicted exactly."""
        wanted = np.take_along_axis(self.tokens, self.positions.clip(0), axis=1)
        return ((self.positions >= 0) & (wanted == self.predicted)).sum(1)

    def save(self, path: str | Path) -> None:
        """Writes an npz file without pickled objects."""
        about = {"grid": self.grid, "names": self.names, "environment": self.environment}
        arrays: dict[str, Any] = {
            name: value for name, value in self._asdict().items() if isinstance(value, np.ndarray)
        }
        np.savez_compressed(path, about=np.array(json.dumps(about)), **arrays)

    @classmethod
    def load(cls, path: str | Path) -> ReportSamples:
        """Reads what ``save`` wrote.

        Raises:
            ValueError: the file is not one of these.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            about = json.loads(str(arrays.pop("about")))
            return cls(
                **{"from_tokens": None, "from_predicted": None, **arrays},
                grid=(int(about["grid"][0]), int(about["grid"][1])),
                names=[str(name) for name in about["names"]],
                environment={str(k): str(v) for k, v in about["environment"].items()},
            )
        except Exception as error:
            # numpy, zipfile and json each raise their own kinds for a file that isn't one.
            raise ValueError(
                f"{path} holds no report samples ({type(error).__name__}: {error}); "
                "delete it to render the report without pictures"
            ) from error


@torch.inference_mode()
def collect_samples(
    model: torch.nn.Module,
    tokenizer: Any,
    batch: MimBatch,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    grid: tuple[int, int],
    names: Sequence[str] | None = None,
    limit: int = 8,
) -> ReportSamples:
    """Runs model and tokenizer on the first ``limit`` images of ``batch``, each on its own device.

    Args:
        model: ``model(images, positions) -> logits [B, M, V]``; put back into its mode after.
        tokenizer: ``encode(token_images) -> [B, N]`` and ``decode([B, h, w]) -> [B, C, H, W]`` in
            0 to 1, which raises ValueError where it has no decoder.
        batch: one micro-batch.
        mean, std: what the student's images were normalised with.
        grid: patches down and across.
        names: what to call the samples; default their numbers in the source.
    """
    keep = min(limit, len(batch))
    positions = batch.positions[:keep]
    was_training = model.training
    model.eval()
    try:
        home = next(model.parameters())
        logits = model(batch.images[:keep].to(home), positions.to(home.device))
    finally:
        model.train(was_training)
    predicted_BM = logits.float().argmax(-1).cpu()
    tokens_BN = tokenizer.encode(batch.token_images[:keep].to(_device_of(tokenizer))).cpu()
    filled_BN = fill(tokens_BN, positions.cpu(), predicted_BM)
    drawings: list[np.ndarray | None] = [None, None]
    try:
        drawings = [
            _to_uint8(tokenizer.decode(codes.view(keep, *grid).to(_device_of(tokenizer))))
            for codes in (tokens_BN, filled_BN)
        ]
    except ValueError:
        pass  # a tokenizer without a decoder: the page says so in place of the pictures
    channels = batch.images.shape[1]
    mean_C11 = torch.tensor(list(mean)[:channels]).view(-1, 1, 1)
    std_C11 = torch.tensor(list(std)[:channels]).view(-1, 1, 1)
    numbers = batch.index[:keep].tolist()
    return ReportSamples(
        images=_to_uint8(batch.images[:keep].float().cpu() * std_C11 + mean_C11),
        positions=positions.cpu().numpy(),
        tokens=tokens_BN.numpy(),
        predicted=predicted_BM.numpy(),
        from_tokens=drawings[0],
        from_predicted=drawings[1],
        grid=grid,
        names=list(names)[:keep] if names is not None else [f"sample {n}" for n in numbers],
        environment=describe_environment(home.device),
    )


def fill(tokens_BN: Tensor, positions_BM: Tensor, predicted_BM: Tensor) -> Tensor:
    """``tokens`` with ``predicted`` at ``positions``; empty slots change nothing."""
    # An extra column takes what the empty slots hold.
    padded = torch.cat([tokens_BN, torch.zeros_like(tokens_BN[:, :1])], dim=1)
    slots = positions_BM.long()
    slots = torch.where(slots < 0, tokens_BN.shape[1], slots)
    return padded.scatter(1, slots, predicted_BM.to(padded.dtype))[:, :-1]


def describe_environment(device: torch.device) -> dict[str, str]:
    """Versions, device and commit, for the record."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    found = {
        "fastbeit": fastbeit.__version__,
        "commit": _commit() or "not known (not a git checkout)",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": f"{device.type} ({name})",
        "system": f"{platform.system()} {platform.release()}",
    }
    if device.type == "cuda":
        found["cuda"] = str(torch.version.cuda)
    return found


def _commit() -> str | None:
    """The commit of the checkout that fastbeit is imported from, marked when files differ."""
    package = Path(fastbeit.__file__).resolve().parent
    if not (package.parent / ".git").exists():
        return None
    try:
        commit, status = (
            subprocess.run(
                ["git", "-C", str(package.parent), *arguments],
                capture_output=True,
                text=True,
                check=True,
                timeout=10,
            ).stdout.strip()
            for arguments in (
                ("rev-parse", "--short=12", "HEAD"),
                ("status", "--porcelain", "--untracked-files=no", "--", "fastbeit", "kernels"),
            )
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + (" with local changes" if status else "")


def _device_of(module: Any) -> torch.device:
    parameter = next(iter(module.parameters()), None)
    return torch.device("cpu") if parameter is None else parameter.device


def _to_uint8(images: Tensor) -> np.ndarray:
    """``[B, C, H, W]`` in 0 to 1 -> uint8 ``[B, H, W, C]``."""
    pixels = (images.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().contiguous().numpy()
