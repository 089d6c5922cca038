"""The DALI loader: worker processes read files and draw plans, DALI decodes and makes the views.

A file that DALI can't decode names no sample and takes the runs under way with it. The plan being
data, nothing is lost: the pipeline is built anew, the batch is decoded file by file to find the
culprits, PIL decodes those, or they are replaced as bad samples if PIL can't either, and the same
batches are fed again. The result depends on the files alone, not on what was under way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastbeit.data.dali_pipeline import build_decoder, build_pipeline, pipeline_inputs
from fastbeit.data.encoded import (
    EncodedBatch,
    EncodedImage,
    EncodedWork,
    by_pil,
    encoded_batch,
    encoded_image,
    no_images,
)
from fastbeit.data.gather import Gatherer, Job, NoGoodSample
from fastbeit.data.header import BadImage, quiet_pil
from fastbeit.data.reference import ViewBatch, no_views
from fastbeit.data.workers import Places, WorkerPool

_PHOTO_BYTES = 200_000  # of an encoded image, to guess whether batches fit into shared memory


class DaliEngine:
    """Yields ``ViewBatch`` in order; on a GPU its views are there already.

    Args:
        job: what to load.
        places: which micro-batches.
        workers: processes that read ahead (0: none), and DALI's threads.
        prefetch: micro-batches under way in each worker and in DALI.
        device: a CPU or a CUDA device.
        hw_decoder_load: see ``build_pipeline``.
        needs_main: see ``WorkerPool``.
    """

    def __init__(
        self,
        job: Job,
        places: Places,
        *,
        workers: int,
        prefetch: int,
        device: torch.device,
        hw_decoder_load: float,
        needs_main: bool = False,
    ) -> None:
        self._job = job
        self._hw_decoder_load = hw_decoder_load
        self._device = device
        self._device_id = None
        if device.type == "cuda":
            self._device_id = torch.cuda.current_device() if device.index is None else device.index
        self._threads = max(1, workers)
        self._jitter = max(job.plan.jitter) > 0
        # Never deeper than what there is to load: DALI starts by filling its queue.
        self._depth = max(1, min(prefetch, len(places)))
        self._pool = WorkerPool(
            EncodedWork(job),
            places,
            workers=workers,
            prefetch=prefetch,
            pin_memory=False,
            batch_bytes=job.batch * _PHOTO_BYTES,
            needs_main=needs_main,
        )
        self._gatherer = Gatherer(job)
        self._by_pil: set[int] = set()  # samples that PIL reads and DALI does not
        self._under_way: deque[EncodedBatch] = deque()
        self._held: deque[tuple[torch.cuda.Event, Any]] = deque()
        self._started = False
        self._decoder: Any = None
        try:
            self._pipeline: Any = self._build(self._depth)
        except BaseException:
            self._pool.close()
            raise

    def __iter__(self) -> Iterator[ViewBatch]:
        return self

    def __next__(self) -> ViewBatch:
        if not self._started:
            self._start()
        if not self._under_way:
            raise StopIteration
        head = self._under_way[0]
        if not head.complete:
            return no_views(head.bad)
        try:
            images, token_images = self._collect(self._pipeline, head)
        except RuntimeError as error:  # what DALI raises for anything; no sample is named
            head = self._repaired(head)
            if not head.complete:
                return no_views(head.bad)
            images, token_images = self._alone(head, error)
            self._under_way.popleft()
            self._started = False
        else:
            self._under_way.popleft()
            if self._take():
                self._follow()
        return ViewBatch(
            head.index,
            images,
            token_images,
            self._pinned(head.positions),
            None if head.drop_scale is None else self._pinned(head.drop_scale),
            head.bad,
            True,
        )

    def close(self) -> None:
        """End the workers and DALI's threads."""
        self._pool.close()
        self._under_way.clear()
        self._held.clear()
        self._pipeline = None
        self._started = True

    def _build(self, depth: int) -> Any:
        return build_pipeline(
            self._job.views,
            batch=self._job.batch,
            jitter=self._jitter,
            depth=depth,
            threads=self._threads,
            device_id=self._device_id,
            hw_decoder_load=self._hw_decoder_load,
        )

    def _start(self) -> None:
        """Fill the pipeline's queue: at first, and after a recovery, with what was under way."""
        while len(self._under_way) < self._depth and self._take():
            pass
        batches = [batch for batch in self._under_way if batch.complete]
        self._started = True
        if not batches:
            return
        # DALI's first run takes as many batches as its queue is deep: no deeper than there are.
        if self._pipeline is None or len(batches) < self._depth:
            self._pipeline = self._build(len(batches))
        for batch in batches:
            self._feed(self._pipeline, batch)
        self._pipeline.schedule_run()

    def _follow(self) -> None:
        """Feed the batch that was taken last and start its run."""
        try:
            self._feed(self._pipeline, self._under_way[-1])
            self._pipeline.schedule_run()
        except RuntimeError:  # a batch before it has failed: start over with all that are waiting
            self._pipeline = None
            self._started = False

    def _take(self) -> bool:
        """Queue the workers' next batch. False when there is none that DALI could be fed."""
        if self._under_way and not self._under_way[-1].complete:
            return False
        batch = next(self._pool, None)
        if batch is None:
            return False
        if batch.complete:
            known = self._by_pil | self._gatherer.bad.keys()
            batch = self._replaced(
                batch, [row for row, index in enumerate(batch.index.tolist()) if index in known]
            )
        self._under_way.append(batch)
        return batch.complete

    def _feed(self, pipeline: Any, batch: EncodedBatch) -> None:
        pipeline.feed_input("encoded", batch.files())
        inputs = pipeline_inputs(
            batch.plan(), batch.sizes.numpy(), self._job.views.channels, jitter=self._jitter
        )
        for name, array in inputs.items():
            pipeline.feed_input(name, array)

    def _collect(self, pipeline: Any, batch: EncodedBatch) -> tuple[Tensor, Tensor]:
        """Wait for the oldest run: both views as uint8 ``[B, h, w, C]`` on the device.

        Raises:
            RuntimeError: DALI failed, or an image was not of the size that its header says.
        """
        if self._device_id is None:
            *views, shapes = pipeline.share_outputs()
            stream = None
        else:
            stream = torch.cuda.current_stream(self._device_id)
            *views, shapes = pipeline.share_outputs(stream)
        pipeline.release_outputs()
        if not np.array_equal(np.array(shapes.as_tensor())[:, :2], batch.sizes.numpy()):
            raise RuntimeError("an image was decoded to another size than its header says")
        with torch.device(self._device):
            images, token_images = (torch.from_dlpack(view.as_tensor()) for view in views)
        if stream is None:
            return images, token_images
        # Copies on PyTorch's stream; DALI's memory is kept until they are done, without waiting.
        images, token_images = images.clone(), token_images.clone()
        done = torch.cuda.Event()
        done.record(stream)
        self._held.append((done, views))
        while self._held and self._held[0][0].query():
            self._held.popleft()
        return images, token_images

    def _alone(self, batch: EncodedBatch, first_error: RuntimeError) -> tuple[Tensor, Tensor]:
        """Run one batch in a pipeline of its own, whose next runs can't disturb it."""
        pipeline = self._build(1)
        self._feed(pipeline, batch)
        pipeline.schedule_run()
        try:
            return self._collect(pipeline, batch)
        except RuntimeError as error:
            raise RuntimeError(
                f"DALI fails on a batch of which it decodes every file alone: {error}"
            ) from first_error

    def _repaired(self, batch: EncodedBatch) -> EncodedBatch:
        """The batch without the files that DALI can't decode; decodes it file by file."""
        self._pipeline = None
        sizes = batch.sizes.tolist()
        return self._replaced(
            batch,
            [
                row
                for row, data in enumerate(batch.files())
                if not self._decodes(data, tuple(sizes[row]))
            ],
        )

    def _decodes(self, data: NDArray[np.uint8], size: tuple[int, int]) -> bool:
        """Whether DALI decodes this file, to this size."""
        if self._decoder is None:
            self._decoder = build_decoder(self._device_id)
        try:
            self._decoder.feed_input("encoded", [data])
            self._decoder.schedule_run()
            _, shapes = self._decoder.share_outputs()
            self._decoder.release_outputs()
        except RuntimeError:
            self._decoder = None  # a pipeline is of no use after an error
            return False
        return tuple(np.array(shapes.as_tensor())[0, :2].tolist()) == size

    def _replaced(self, batch: EncodedBatch, rows: list[int]) -> EncodedBatch:
        """The batch with other bytes, or another sample, in ``rows``; plans drawn anew."""
        if not rows:
            return batch
        for record in batch.bad:
            self._gatherer.bad.setdefault(record.index, record.reason)
        images = [
            EncodedImage(index, (height, width), data.tobytes())
            for index, (height, width), data in zip(
                batch.index.tolist(), batch.sizes.tolist(), batch.files(), strict=True
            )
        ]
        plan = batch.plan()
        try:
            with quiet_pil():
                for row in rows:
                    image = images[row] = self._readable(images[row].index)
                    if image.index != plan.index[row]:
                        self._gatherer.replan(plan, row, batch.epoch, image.index, image.size)
        except NoGoodSample:
            return no_images(batch.epoch, self._gatherer.all_records())
        return encoded_batch(self._gatherer, batch.epoch, batch.wanted.numpy(), images, plan)

    def _readable(self, index: int) -> EncodedImage:
        """A sample that DALI can't decode, by PIL; or the first good one after it.

        Raises:
            NoGoodSample: see ``Gatherer``.
        """
        while True:
            if index not in self._gatherer.bad:
                try:
                    sample = self._gatherer.open(index)
                    data = by_pil(sample, self._job.views.channels)
                    self._by_pil.add(index)
                    return EncodedImage(index, sample.size, data)
                except BadImage as error:
                    self._gatherer.mark(index, error.reason)
            image = encoded_image(self._gatherer, index + 1)
            if image.index not in self._by_pil and self._decodes(
                np.frombuffer(image.data, np.uint8), image.size
            ):
                return image
            index = image.index

    def _pinned(self, tensor: Tensor) -> Tensor:
        return tensor if self._device_id is None else tensor.pin_memory()
