"""Sample grids, drawn by a thread of their own."""

import concurrent.futures
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ddpm_tf.callbacks.base import StepCallback, is_due
from ddpm_tf.callbacks.stop_on_signal import StopOnSignal
from ddpm_tf.cluster.cluster import Cluster


class SampleGrids(StepCallback):
    """Draws a grid every `every` steps and at the end, unless training is being stopped.

    Drawing takes long. A thread of its own does it, so that a signal is answered meanwhile: then the state after the step is
    saved and the grid is given up. The next start draws it first.

    Args:
        draw: draw(step) -> samples. It must not exchange anything with other workers.
        show: show(step, samples) writes them.
        is_drawn: is_drawn(step), whether the pictures of that step exist.
        stop: StopOnSignal.
        cluster: Cluster. All workers draw together, and give up together.
    """

    def __init__(
        self,
        start_step: int,
        *,
        every: int,
        num_steps: int,
        draw: Callable[[int], Any],
        show: Callable[[int, Any], None],
        is_drawn: Callable[[int], bool],
        stop: StopOnSignal,
        cluster: Cluster,
    ) -> None:
        super().__init__(start_step)
        self.every, self.num_steps, self.stop, self.cluster = every, num_steps, stop, cluster
        self.draw, self.show, self.is_drawn = draw, show, is_drawn

    def on_train_begin(self, logs: Mapping[str, float] | None = None) -> None:
        if self.start_step and not self.is_drawn(self.start_step):
            self.on_step(self.start_step, {})

    def on_step(self, step: int, logs: Mapping[str, float]) -> None:
        if not (is_due(step, self.every) or step >= self.num_steps) or self.model.stop_training:
            return
        drawing: concurrent.futures.Future = concurrent.futures.Future()
        threading.Thread(target=self._draw_into, args=(drawing, step), daemon=True).start()
        num_done = 0
        while num_done < self.cluster.size:
            concurrent.futures.wait([drawing], timeout=0.1)
            state = np.array([drawing.done(), self.stop.signal is not None], np.int64)
            num_done, num_signalled = self.cluster.all_reduce(state)
            if num_signalled:
                self.stop.stop(step)
                return
        self.show(step, drawing.result())

    def _draw_into(self, drawing: concurrent.futures.Future, step: int) -> None:
        try:
            drawing.set_result(self.draw(step))
        except BaseException as e:
            drawing.set_exception(e)
