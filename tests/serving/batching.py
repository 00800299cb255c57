"""Server-side batching for the stand-in, by the rules of TensorFlow Serving's BatchingParameters."""

import concurrent.futures
import queue
import threading
import time

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format, wrappers_pb2

from tests.serving.c_api import INVALID_ARGUMENT, CError

UNAVAILABLE = 14


class Batcher:
    """Merges concurrent requests of one signature into runs of at most max_batch_size rows.

    Args:
        run: (signature, {key: array}) -> {key: array}, every array with the same leading dimension.
        parameters: a BatchingParameters: a run starts when it is full or its oldest request has waited
            batch_timeout_micros; it is padded to the next of allowed_batch_sizes; at most num_batch_threads run at a time;
            requests beyond max_enqueued_batches are refused.
    """

    def __init__(self, run, parameters):
        self._run, self._parameters = run, parameters
        self._threads = threading.Semaphore(parameters.num_batch_threads.value or 1)
        self._queues, self._lock = {}, threading.Lock()

    def run(self, signature, inputs):
        sizes = {value.shape[0] if value.ndim else None for value in inputs.values()}
        if len(sizes) != 1 or None in sizes:
            raise CError(INVALID_ARGUMENT, "Batching Run() input tensors must have equal 0th-dimension size")
        (size,) = sizes
        limit = self._parameters.max_batch_size.value
        if size > limit:
            raise CError(INVALID_ARGUMENT, f"Task size {size} is larger than maximum input batch size {limit}")
        # Only requests whose rows have the same types and shapes can be stacked.
        kind = (signature, *((key, v.dtype.str, v.shape[1:]) for key, v in sorted(inputs.items())))
        with self._lock:
            if kind not in self._queues:
                self._queues[kind] = queue.Queue()
                threading.Thread(target=self._work, args=(signature, self._queues[kind]), daemon=True).start()
        if self._queues[kind].qsize() >= self._parameters.max_enqueued_batches.value * limit:
            raise CError(UNAVAILABLE, "The batch scheduling queue to which this task was submitted is full")
        future = concurrent.futures.Future()
        self._queues[kind].put((time.monotonic(), size, inputs, future))
        return future.result()

    def _work(self, signature, tasks):
        left_over = None
        while True:
            batch = [left_over or tasks.get()]
            with self._threads:
                left_over = self._fill(batch, tasks)
                self._run_batch(signature, batch)

    def _fill(self, batch, tasks):
        end = batch[0][0] + self._parameters.batch_timeout_micros.value * 1e-6
        total, limit = batch[0][1], self._parameters.max_batch_size.value
        while total < limit:
            try:
                task = tasks.get(timeout=max(end - time.monotonic(), 1e-6))
            except queue.Empty:
                return None
            total += task[1]
            if total > limit:
                return task
            batch.append(task)
        return None

    def _run_batch(self, signature, batch):
        sizes = [task[1] for task in batch]
        total = sum(sizes)
        padding = next((s for s in self._parameters.allowed_batch_sizes if s >= total), total) - total
        try:
            inputs = {
                key: np.concatenate([task[2][key] for task in batch] + [batch[0][2][key][:1]] * padding)
                for key in batch[0][2]
            }
            outputs = self._run(signature, inputs)
            ends = np.cumsum(sizes)
            for task, end in zip(batch, ends, strict=True):
                task[3].set_result({key: value[end - task[1] : end] for key, value in outputs.items()})
        except Exception as e:  # every request of a run gets its error, as on the real server
            for task in batch:
                task[3].set_exception(e)


def read_batching(text):
    """The BatchingParameters of a batching.config.

    tensorflow-serving-api does not hold this message, so it is described here, with the names and numbers that
    TensorFlow Serving documents in session_bundle_config.proto.
    """
    file = descriptor_pb2.FileDescriptorProto(name="batching.proto", package="stand_in", syntax="proto3")
    file.dependency.append(wrappers_pb2.DESCRIPTOR.name)
    message = file.message_type.add(name="BatchingParameters")
    names = ("max_batch_size", "batch_timeout_micros", "max_enqueued_batches", "num_batch_threads")
    for number, name in enumerate(names, start=1):
        message.field.add(name=name, number=number, type=11, label=1, type_name=".google.protobuf.Int64Value")
    message.field.add(name="allowed_batch_sizes", number=6, type=3, label=3)
    message.field.add(name="pad_variable_length_inputs", number=7, type=8, label=1)
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(wrappers_pb2.DESCRIPTOR.serialized_pb)
    pool.Add(file)
    kind = message_factory.GetMessageClass(pool.FindMessageTypeByName("stand_in.BatchingParameters"))
    return text_format.Parse(text, kind())
