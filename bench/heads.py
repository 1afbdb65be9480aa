"""What a step does beside its convolutions, and post-processing: ours beside torchvision's, in turn in one
process, on two threads, at COCO's size.

Both get the same predictions, of which some hundred are good, and the same boxes. Targets and losses come
with their gradients, post-processing goes up to 100 detections, with NMS (torchvision's in C, see
bench.beside).
"""

from typing import Any

import torch
from torch import Tensor

from bench import beside
from bench.detectors import CLASSES, MODELS, THREADS, Seconds, batch, learner, their_targets, timed
from bench.measure import Result, in_turn, show
from detcore.data.feed import Inputs
from detcore.models.heads import Predictions
from detcore.ops.select import inside

WHOLE = (800, 1088)  # height and width
STRIDES = (8, 16, 32, 64, 128)


def main() -> list[Result]:
    torch.set_num_threads(THREADS)
    beside.bring()
    return [result for name in MODELS for result in parts(name)]


def parts(name: str) -> list[Result]:
    inputs = batch(2, WHOLE)
    model, other = learner(MODELS[name]).model, beside.build(name, CLASSES, WHOLE)
    predictions = invented(model, inputs)
    claims = []
    for what, ours, theirs in [
        ("targets and losses", our_losses, their_losses),
        ("post-processing", our_detections, their_detections),
    ]:
        claim = f"{name}: {what}, 2 images of {WHOLE[1]}x{WHOLE[0]}"
        own, other_own = (make(of, predictions, inputs) for make, of in ((ours, model), (theirs, other)))
        claims.append(in_turn(claim, "<= 0.5", ("detcore", own), ("torchvision", other_own)))
    return claims


def invented(model: torch.nn.Module, inputs: Inputs) -> Predictions:
    """What a trained detector may say: background that is sure of itself, and around each object places that
    are not all sure."""
    generator = torch.Generator().manual_seed(1)
    shapes = tuple((-(-WHOLE[0] // stride), -(-WHOLE[1] // stride)) for stride in STRIDES)
    rows, count = sum(h * w for h, w in shapes) * model.head.anchors, len(inputs.images)
    logits = torch.randn(count, rows, CLASSES, generator=generator).sub_(7)
    boxes = torch.rand(count, rows, 4, generator=generator) * (4 if model.head.branch else 0.2)
    centerness = torch.randn(count, rows, generator=generator) if model.head.branch else None
    predictions = Predictions(logits, boxes, centerness, shapes)
    first = model.anchors(predictions) if model.head.branch is None else predictions
    assigned = model.assign(first, inputs.targets)
    for image, gt in enumerate(assigned):
        place = (gt >= 0).nonzero()[:, 0]
        label = inputs.targets.labels[image, gt[place]]
        logits[image, place, label] = torch.randn(len(place), generator=generator)
    return predictions


def leaves(predictions: Predictions) -> Predictions:
    """The same, to be differentiated by."""
    return Predictions(
        *(t.clone().requires_grad_() if isinstance(t, Tensor) else t for t in predictions),
    )


def our_losses(model: torch.nn.Module, predictions: Predictions, inputs: Inputs) -> Seconds:
    wanted = leaves(predictions)
    return timed(lambda: differentiate(model.losses(wanted, inputs.targets), wanted))


def their_losses(model: torch.nn.Module, predictions: Predictions, inputs: Inputs) -> Seconds:
    wanted, targets = leaves(predictions), their_targets(inputs.targets)
    outputs, images, maps = their_outputs(wanted), image_list(inputs), feature_maps(predictions)
    levels = [h * w for h, w in predictions.shapes]

    def losses() -> Any:
        anchors = model.anchor_generator(images, maps)
        return model.compute_loss(targets, outputs, anchors, *([] if wanted.centerness is None else [levels]))

    return timed(lambda: differentiate(losses(), wanted))


def differentiate(losses: dict[str, Tensor], by: Predictions) -> None:
    torch.autograd.grad(sum(losses.values()), [t for t in by if isinstance(t, Tensor)])


def our_detections(model: torch.nn.Module, predictions: Predictions, inputs: Inputs) -> Seconds:
    def detections() -> None:
        found = model.select(predictions, inputs.sizes)
        if not model.clip_first:
            inside(found, inputs.sizes)

    return timed(torch.no_grad()(detections))


def their_detections(model: torch.nn.Module, predictions: Predictions, inputs: Inputs) -> Seconds:
    cells = [height * width for height, width in predictions.shapes]
    per_level = [count * predictions.logits.shape[1] // sum(cells) for count in cells]
    images, maps = image_list(inputs), feature_maps(predictions)

    @torch.no_grad()
    def detections() -> None:
        anchors = [list(own.split(per_level)) for own in model.anchor_generator(images, maps)]
        levels = {key: list(t.split(per_level, dim=1)) for key, t in their_outputs(predictions).items()}
        model.postprocess_detections(levels, anchors, images.image_sizes)

    return timed(detections)


def their_outputs(predictions: Predictions) -> dict[str, Tensor]:
    outputs = {"cls_logits": predictions.logits, "bbox_regression": predictions.boxes}
    if predictions.centerness is not None:
        outputs["bbox_ctrness"] = predictions.centerness[..., None]
    return outputs


def image_list(inputs: Inputs) -> Any:
    from torchvision.models.detection.image_list import ImageList

    return ImageList(inputs.images.float(), [tuple(size) for size in inputs.sizes.tolist()])


def feature_maps(predictions: Predictions) -> list[Tensor]:
    """Of which torchvision's anchors need the shapes."""
    return [torch.empty(len(predictions.logits), 1, *shape) for shape in predictions.shapes]


if __name__ == "__main__":
    show(main())
