"""Sample grids, drawn by a thread of their own."""

import concurrent.futures
import threading

import numpy as np

from ddpm_tf.callbacks.base import StepCallback, is_due


class SampleGrids(StepCallback):
    """Draws a grid every `every` steps and at the end, unless training is being stopped.

    Args:
        draw: draw(step) -> what is drawn, without talking to other workers.
        show: show(step, drawn), writes it.
        is_drawn: is_drawn(step), whether its pictures are there; a run that was stopped while drawing draws them first.
        stop: StopOnSignal.
        cluster: Cluster; all workers draw, and stop drawing, together.

    A grid takes long. It is drawn by a thread of its own, so that a signal is answered meanwhile: the state after the
    step is saved and the grid given up.
    """

    def __init__(self, start_step, *, every, num_steps, draw, show, is_drawn, stop, cluster):
        super().__init__(start_step)
        self.every, self.num_steps, self.stop, self.cluster = every, num_steps, stop, cluster
        self.draw, self.show, self.is_drawn = draw, show, is_drawn

    def on_train_begin(self, logs=None):
        if self.start_step and not self.is_drawn(self.start_step):
            self.on_step(self.start_step, logs)

    def on_step(self, step, logs):
        if not (is_due(step, self.every) or step >= self.num_steps) or self.model.stop_training:
            return
        drawing = concurrent.futures.Future()
        threading.Thread(target=self._draw_into, args=(drawing, step), daemon=True).start()
        done = 0
        while done < self.cluster.size:
            concurrent.futures.wait([drawing], timeout=0.1)
            state = np.array([drawing.done(), self.stop.signal is not None], np.int64)
            done, wishes = self.cluster.all_reduce(state)
            if wishes:
                self.stop.stop(step)
                return
        self.show(step, drawing.result())

    def _draw_into(self, drawing, step):
        try:
            drawing.set_result(self.draw(step))
        except BaseException as e:
            drawing.set_exception(e)
