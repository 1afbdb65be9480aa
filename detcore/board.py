"""TensorBoard files, through tensorboard's own small writer: torch's takes seconds to import."""

import io
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image


class Operation(NamedTuple):
    """A node of a graph: a name like a path, what it does, the names of those whose output it takes, and the
    shape of its own."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...]


class Board:
    """Scalars and pictures of one attempt, in an event file of its own. Nothing is imported or opened before
    the first of them; a disk that refuses them ends them, not the training."""

    def __init__(self, folder: Path, fence: int, resumed: int) -> None:
        self.folder, self.fence, self.resumed = folder, fence, resumed
        self._writer: Any = None
        self.broken = False

    def scalars(self, step: int, values: dict[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._add(step, Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in values.items()]))

    def picture(self, step: int, tag: str, image: Image.Image) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        file = io.BytesIO()
        image.save(file, "PNG")
        size = {"height": image.height, "width": image.width, "colorspace": 3}
        shown = Summary.Image(encoded_image_string=file.getvalue(), **size)
        self._add(step, Summary(value=[Summary.Value(tag=tag, image=shown)]))

    def graph(self, operations: Iterable[Operation]) -> None:
        """Operations and what they take from each other, for TensorBoard's page of graphs."""
        from tensorboard.compat.proto.attr_value_pb2 import AttrValue
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.graph_pb2 import GraphDef
        from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
        from tensorboard.compat.proto.versions_pb2 import VersionDef

        graph = GraphDef(versions=VersionDef(producer=22))
        for one in operations:
            node = graph.node.add(name=one.name, op=one.kind, input=one.inputs)
            shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=side) for side in one.shape])
            node.attr["_output_shapes"].CopyFrom(AttrValue(list=AttrValue.ListValue(shape=[shape])))
        self._guard(lambda: self._open().add_event(Event(graph_def=graph.SerializeToString())))

    def flush(self) -> None:
        self._guard(lambda: self._writer and self._writer.flush())

    def close(self) -> None:
        self._guard(lambda: self._writer and self._writer.close())

    def _add(self, step: int, summary: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._guard(lambda: self._open().add_event(Event(step=step, wall_time=time.time(), summary=summary)))

    def _open(self) -> Any:
        if self._writer is None:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            from tensorboard.summary.writer.event_file_writer import EventFileWriter

            self._writer = EventFileWriter(str(self.folder), flush_secs=10, filename_suffix=f".{self.fence}")
            # TensorBoard hides what an earlier attempt wrote past the step that this one resumed at.
            start = SessionLog(status=SessionLog.START)
            self._writer.add_event(Event(step=self.resumed + 1, wall_time=time.time(), session_log=start))
        return self._writer

    def _guard(self, action: Any) -> None:
        if self.broken:
            return
        try:
            action()
        except OSError as error:
            self.broken = True
            print(f"no more TensorBoard events in this attempt: {error}", file=sys.stderr, flush=True)
