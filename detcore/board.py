"""TensorBoard files, through tensorboard's own small writer: torch's takes seconds to import."""

import io
import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image


class Board:
    """Scalars and pictures of one attempt, in an event file of its own. Nothing is imported or opened before
    the first of them; a disk that refuses them ends them, not the training."""

    def __init__(self, folder: Path, fence: int, resumed: int) -> None:
        self.folder, self.fence, self.resumed = folder, fence, resumed
        self._writer: Any = None
        self._broken = False

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
        if self._broken:
            return
        try:
            action()
        except OSError as error:
            self._broken = True
            print(f"no more TensorBoard events in this attempt: {error}", file=sys.stderr, flush=True)
