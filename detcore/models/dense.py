"""What detectors with one head on all levels of a pyramid share: images to losses, images to detections."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from detcore.backbones.layers import Normalize
from detcore.models.heads import DenseHead, Predictions
from detcore.ops.select import inside, select
from detcore.ops.targets import Candidates, Detections, Targets


class DenseDetector(nn.Module):
    """backbone -> neck -> head. A detector adds `losses`, `decode` and, if need be, `scores`.

    backbone            its `pixels` are what it wants to see
    neck                its `strides` are those of the levels
    score, topk         candidates: at most `topk` a level, with a score above `score`
    nms_iou             of which NMS by class leaves
    max_detections      at most so many an image
    """

    clip_first = True  # boxes are cut to the image before NMS; see `select`

    def __init__(
        self,
        backbone: nn.Module,
        neck: nn.Module,
        head: DenseHead,
        *,
        score: float,
        topk: int,
        nms_iou: float,
        max_detections: int,
    ) -> None:
        super().__init__()
        self.backbone, self.neck, self.head = backbone, neck, head
        self.normalize = Normalize(backbone.pixels)
        self.score, self.topk, self.nms_iou, self.max_detections = score, topk, nms_iou, max_detections

    def forward(self, images: Tensor, sizes: Tensor, targets: Targets) -> dict[str, Tensor]:
        """images (N, 3, H, W) uint8 RGB, sizes (N, 2) true (h, w) -> loss terms by name, scalars."""
        predictions = self.head(self.features(images, sizes))
        with torch.autocast(images.device.type, enabled=False):
            return self.losses(predictions, targets)

    @torch.no_grad()
    def detect(self, images: Tensor, sizes: Tensor) -> Detections:
        """Detections inside the true image, in pixels of `images`."""
        found = self.select(self.head(self.features(images, sizes)), sizes)
        return found if self.clip_first else inside(found, sizes)

    @torch.no_grad()
    def scored(self, images: Tensor, sizes: Tensor) -> Candidates:
        """What `detect` chooses from, with final scores; it compares those without centerness with
        `score`."""
        predictions = self.head(self.features(images, sizes))
        scores, quality = self.scores(predictions)
        return Candidates(
            self.decode(predictions), scores if quality is None else scores * quality[..., None]
        )

    def features(self, images: Tensor, sizes: Tensor) -> Sequence[Tensor]:
        """Bytes to the levels of the pyramid."""
        return self.neck(self.backbone(self.normalize(images, sizes)))

    def losses(self, predictions: Predictions, targets: Targets) -> dict[str, Tensor]:
        raise NotImplementedError

    def decode(self, predictions: Predictions, rows: Tensor | None = None) -> Tensor:
        """Boxes (N, R, 4) in pixels, not clipped; or those of rows (N, r)."""
        raise NotImplementedError

    def scores(self, predictions: Predictions) -> tuple[Tensor, Tensor | None]:
        """What candidates are chosen by (N, R, K), and what multiplies it afterwards (N, R), if anything."""
        quality = predictions.centerness
        return predictions.logits.sigmoid(), None if quality is None else quality.sigmoid()

    def best(self, predictions: Predictions) -> tuple[Tensor, Tensor | None]:
        """As `scores`, of each row the highest (N, R)."""
        # That of the highest logit, so that only R and not R * K are computed.
        most = predictions.logits.amax(dim=-1, keepdim=True)
        scores, quality = self.scores(predictions._replace(logits=most))
        return scores.squeeze(-1), quality

    def select(self, predictions: Predictions, sizes: Tensor) -> Detections:
        """The best of all predictions."""
        best, quality = self.best(predictions)
        return select(
            best,
            lambda rows: self.scores(predictions.at(rows))[0],
            lambda rows: self.decode(predictions, rows),
            self.level_rows(predictions),
            score=self.score,
            topk=self.topk,
            nms_iou=self.nms_iou,
            limit=self.max_detections,
            quality=quality,
            sizes=sizes if self.clip_first else None,
        )

    def level_rows(self, predictions: Predictions) -> list[int]:
        """How many rows each level has."""
        return [height * width * self.head.anchors for height, width in predictions.shapes]
