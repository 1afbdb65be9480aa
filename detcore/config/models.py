"""`train.model`: one section for each detector, told apart by `name`. Defaults are the published numbers."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from detcore.config.section import Count, Factor, Positive, Section, Share

Norm = Literal["bn", "sync_bn"]


class Backbone(Section):
    name: Literal[
        "resnet18", "resnet34", "resnet50", "resnet101", "mobilenetv2", "hrnet_w18", "hrnet_w32", "hrnet_w40"
    ]
    weights: str | None = None
    """A name in detcore.weights' catalogue, a path, an s3:// or https:// address; null: random."""
    style: Literal["caffe", "torchvision", "tensorflow"] = "torchvision"
    """How pixels are normalised; with caffe, of a ResNet, also where the stride is, with tensorflow, of
    MobileNetV2, also how is padded. Must be that of the weights."""
    norm: Literal["frozen_bn", "fixed_bn", "bn", "sync_bn"] = "frozen_bn"
    """frozen_bn does not learn, fixed_bn learns all but its statistics, which both have from `weights`."""
    freeze: Annotated[int, Field(ge=0, le=5)] = 0
    """Stages that are not trained: 1 the stem, 2 the stem and res2, ..."""
    width: Factor = 1.0
    """Factor on all channels."""
    dilate: bool = False
    """Of resnet50 and resnet101, for YOLOF: res5 has dilation 2 and no stride, so twice the resolution."""

    @model_validator(mode="after")
    def has_it(self) -> "Backbone":
        if self.style == "tensorflow" and self.name != "mobilenetv2":
            raise ValueError("has `style` tensorflow, which only mobilenetv2 has")
        if self.dilate and self.name not in ("resnet50", "resnet101"):
            raise ValueError("has `dilate`, which only resnet50 and resnet101 have")
        return self


class Test(Section):
    score: Share = 0.05
    topk: Positive = 1000
    """Candidates before NMS; with a pyramid, of each level."""
    nms: Share = 0.6
    max: Positive = 100


class Detector(Section):
    num_classes: Positive
    backbone: Backbone
    test: Test = Test()

    @model_validator(mode="after")
    def has_its_strides(self) -> "Detector":
        if getattr(self.backbone, "dilate", False) and not isinstance(self, YOLOF):
            raise ValueError("has a `backbone` with `dilate`, which only YOLOF can do with")
        return self


class Encoder(Section):
    channels: Positive = 512
    mid_channels: Positive = 128
    dilations: Annotated[list[Positive], Field(min_length=1)] = [2, 4, 6, 8]


class Decoder(Section):
    cls_convs: Count = 2
    reg_convs: Count = 4


class UniformMatch(Section):
    top: Positive = 4
    """Nearest predictions, and nearest anchors, that each object is matched with."""
    pos_ignore: Share = 0.15
    """Matches whose anchor has a smaller IoU are left out."""
    neg_ignore: Share = 0.7
    """Background whose prediction has a larger IoU is left out."""


class YOLOF(Detector):
    name: Literal["yolof"]
    encoder: Encoder = Encoder()
    decoder: Decoder = Decoder()
    norm: Literal["auto", "bn", "sync_bn"] = "bn"
    """auto: sync_bn where a GPU sees fewer than 8 images at a time, otherwise bn."""
    anchors: Annotated[list[Factor], Field(min_length=1)] = [32, 64, 128, 256, 512]
    match: UniformMatch = UniformMatch()


class Head(Section):
    channels: Positive = 256
    """Of the pyramid and the head."""
    convs: Count = 4
    """Before the predictions, for classes and for boxes each."""


class PyramidDetector(Detector):
    neck: Literal["fpn", "hrfpn"] = "fpn"
    """Levels of strides 8 to 128, from features of strides 8 to 32 (fpn), or 4 to 32 (hrfpn, for HRNet)."""
    head: Head = Head()


class Anchors(Section):
    scale: Factor = 4.0
    """Side of a level's smallest square, in strides."""
    octave: Positive = 3
    """Sizes between one level's and the next."""
    ratios: Annotated[list[Factor], Field(min_length=1)] = [0.5, 1.0, 2.0]
    """Height by width."""


class IoUMatch(Section):
    negative: Share = 0.4
    """Anchors whose IoU with every object is smaller are background."""
    positive: Share = 0.5
    """Anchors with at least this IoU belong to the object; those between are left out."""

    @model_validator(mode="after")
    def ordered(self) -> "IoUMatch":
        if self.negative > self.positive:
            raise ValueError(f"needs `negative` {self.negative:g} not above `positive` {self.positive:g}")
        return self


class RetinaNet(PyramidDetector):
    name: Literal["retinanet"]
    style: Literal["detectron2", "torchvision"] = "detectron2"
    """torchvision's makes P6 from P5 instead of C5, has anchors of whole pixels, and cuts boxes to the image
    before NMS."""
    anchors: Anchors = Anchors()
    match: IoUMatch = IoUMatch()
    normalizer: Factor = 100.0
    """Positive anchors in a batch that the moving average starts from."""
    test: Test = Test(nms=0.5)


class FCOS(PyramidDetector):
    name: Literal["fcos"]
    style: Literal["original", "detectron2", "torchvision"] = "original"
    """detectron2's has no scales, weighs all boxes alike, divides the losses by a moving average and
    compares sqrt(class x centerness) with `test.score`, not the class alone. torchvision's is like it, with
    points at the corners of the cells."""
    distances: Literal["relu", "exp"] = "relu"
    """How a prediction becomes a distance: max(0, x) in strides, or e^x in pixels."""
    centerness: Literal["reg", "cls"] = "reg"
    """The branch that predicts it."""
    radius: Factor | None = 1.5
    """Only points this near an object's centre, in strides, are its own; null: all points inside."""
    box_loss: Literal["giou", "iou"] = "giou"
    ranges: list[Factor] = [64, 128, 256, 512]
    """Largest distance, in pixels, that each level but the last is for."""

    @model_validator(mode="after")
    def rising(self) -> "FCOS":
        if len(self.ranges) != 4 or self.ranges != sorted(set(self.ranges)):
            raise ValueError("needs 4 rising `ranges`, one for each level but the last")
        return self


class ATSS(PyramidDetector):
    name: Literal["atss"]
    scale: Factor = 8.0
    """Side of the anchors, in strides."""
    style: Literal["mmdet", "original"] = "mmdet"
    """original, the authors', has anchors in the middle of the cells, not at their corners, boxes that end
    with their last pixel (a width is x2 - x1 + 1), and nothing in the normalisers for images without objects.
    How candidates are chosen and scored is mmdetection's with both."""
    candidates: Positive = 9
    """Nearest anchors of each level that an object chooses from."""


class Hourglass(Section):
    name: Literal["hourglass"] = "hourglass"
    weights: str | None = None
    """As of other backbones."""
    style: Literal["cornernet", "torchvision"] = "cornernet"
    """How pixels are normalised; with torchvision, as in mmdetection, what is around an image has the mean
    colour, else it is black."""
    stacks: Positive = 2
    dims: list[Positive] = [256, 256, 384, 384, 384, 512]
    """Channels at each resolution, from stride 4 to the innermost."""
    blocks: list[Positive] = [2, 2, 2, 2, 2, 4]
    """Residual blocks in a row at each resolution."""
    stem: Positive = 128
    """Channels of the first convolution."""

    @model_validator(mode="after")
    def paired(self) -> "Hourglass":
        if not 2 <= len(self.dims) == len(self.blocks):
            raise ValueError("needs `dims` and `blocks` for the same resolutions, at least two")
        return self


class CornerTest(Section):
    topk: Positive = 100
    """Corners of each kind that are paired."""
    tag_distance: Factor = 0.5
    """Corners whose embeddings differ by more are no pair."""
    pairs: Positive = 1000
    """Pairs that soft NMS sees."""
    sigma: Factor = 0.5
    """Of soft NMS: a box that overlaps a better one by IoU has its score multiplied by e^(-IoU^2 / sigma)."""
    flip: bool = True
    """Look at the mirror image, too."""
    max: Positive = 100


class CornerNet(Detector):
    name: Literal["cornernet"]
    backbone: Hourglass = Hourglass()
    pool_channels: Positive = 128
    """Of the branches that corner pooling works on."""
    norm: Norm = "bn"
    """Of the backbone, too."""
    iou: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """A corner may be so far off that its box still has this IoU with the object's, at a smaller loss."""
    pull: Annotated[float, Field(ge=0)] = 0.49
    """Weight of what draws an object's embeddings together, as a mean over images. The reference has 0.1 of
    the sum over the images of a GPU, which are 4.9."""
    push: Annotated[float, Field(ge=0)] = 0.49
    """Weight of what drives embeddings of different objects apart; likewise."""
    test: CornerTest = CornerTest()


class Priors(Section):
    strides: list[Factor] = [16, 32, 64, 107, 160, 320]
    """From one cell to the next on each level, in pixels."""
    sizes: list[Factor] = [48, 100, 150, 202, 253, 304, 320]
    """Side of each level's smaller square, in pixels, and one more number: the larger square's side is the
    geometric mean of this one and the next."""
    ratios: Annotated[list[Factor], Field(min_length=1)] = [2.0, 3.0]
    """Of the other boxes, width by height and height by width."""


class SSDMatch(Section):
    positive: Share = 0.5
    """Prior boxes with at least this IoU belong to the object; beside them its best one does."""
    negatives: Positive = 3
    """Prior boxes of the background, the hardest, for each that belongs to an object."""


class SSDLite(Detector):
    name: Literal["ssdlite"]
    style: Literal["mmdet", "tensorflow"] = "mmdet"
    """tensorflow: as the model that TensorFlow released, with sigmoids, no softmax over the classes."""
    extra: list[Positive] = [512, 256, 256, 128]
    """Channels of the levels after the backbone's two."""
    norm: Literal["bn", "sync_bn", "fixed_bn"] = "bn"
    priors: Priors = Priors()
    match: SSDMatch = SSDMatch()
    test: Test = Test(score=0.02, nms=0.45, max=200)

    @model_validator(mode="after")
    def consistent(self) -> "SSDLite":
        levels = 2 + len(self.extra)
        if len(self.priors.strides) != levels or len(self.priors.sizes) != levels + 1:
            raise ValueError(
                f"needs `priors` with {levels} `strides` and {levels + 1} `sizes`: of 2 levels of "
                f"the backbone and the {levels - 2} in `extra`, and the next size"
            )
        if (self.style == "tensorflow") != (self.backbone.style == "tensorflow"):
            raise ValueError("needs `style` tensorflow for itself and for its `backbone`, or for neither")
        return self


Model = Annotated[YOLOF | RetinaNet | FCOS | ATSS | CornerNet | SSDLite, Field(discriminator="name")]
