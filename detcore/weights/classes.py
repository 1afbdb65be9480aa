"""COCO's classes, which published detectors know: id in the data set -> name. The ids have gaps."""

_NAMES = {
    1: "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant",
    13: "stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe",
    27: "backpack, umbrella",
    31: "handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, "
    "skateboard, surfboard, tennis racket, bottle",
    46: "wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, "
    "hot dog, pizza, donut, cake, chair, couch, potted plant, bed",
    67: "dining table",
    70: "toilet",
    72: "tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator",
    84: "book, clock, vase, scissors, teddy bear, hair drier, toothbrush",
}
COCO = {id: name for first, names in _NAMES.items() for id, name in enumerate(names.split(", "), first)}
LAST = max(COCO)


def class_names(count: int) -> list[str]:
    """Names for so many classes of which nothing else is known: COCO's if they are as many as it has classes,
    or ids; otherwise numbers."""
    if count == len(COCO):
        return list(COCO.values())
    if count == LAST:
        return [COCO.get(id, f"COCO {id}") for id in range(1, LAST + 1)]
    return [f"class {number}" for number in range(count)]
