"""Reading COCO files, the order of images, and batches: functions of the seed and the step alone."""

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from detcore.config import Augment, Resize
from detcore.data.coco import Coco, read_coco
from detcore.data.loader import Batch, EvaluationSet, TrainingSet, batches
from detcore.data.order import WINDOW, Order, training_steps
from detcore.errors import InputError

AUGMENT = Augment.model_validate(
    {"short": [48, 64], "max": 64, "shift": {"pixels": 8, "p": 0.5}, "photometric": True}
)


def read(shapes: Path, split: str = "train", training: bool = True) -> Coco:
    return read_coco(shapes / split, shapes / f"annotations/instances_{split}.json", training)


def write(tmp_path: Path, **changes: Any) -> Path:
    content: dict[str, Any] = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 10, "height": 8} for i in (5, 3, 9)],
        "annotations": [
            {"image_id": 3, "category_id": 7, "bbox": [1, 2, 3, 4]},
            {"image_id": 3, "category_id": 2, "bbox": [0, 0, 5, 5], "iscrowd": 1},
            {"image_id": 5, "category_id": 2, "bbox": [0, 0, 0, 5], "iscrowd": 0},
            {"image_id": 9, "category_id": 2, "bbox": [2, 2, 2, 2], "iscrowd": 0},
        ],
        "categories": [{"id": 7, "name": "b"}, {"id": 2, "name": "a"}],
    }
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(content | changes))
    return path


def test_crowds_and_empty_boxes_are_not_trained_on(tmp_path: Path) -> None:
    path = write(tmp_path)
    coco = read_coco(tmp_path, path, training=True)
    assert coco.ids.tolist() == [3, 9], "an image without an object is left out"
    assert coco.categories == [2, 7] and coco.names == ["a", "b"]
    boxes, labels = coco.objects(0)
    assert boxes.tolist() == [[1, 2, 4, 6]] and labels.tolist() == [1]
    assert read_coco(tmp_path, path, training=False).ids.tolist() == [3, 5, 9]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"images": None}, "has no list `images`"),
        (
            {"annotations": [{"image_id": 77, "category_id": 2, "bbox": [0, 0, 1, 1]}]},
            r"annotations\[0\] names image 77, which the file does not have",
        ),
        (
            {"annotations": [{"image_id": 3, "category_id": 4, "bbox": [0, 0, 1, 1]}]},
            r"annotations\[0\] names category 4, which",
        ),
        ({"annotations": [{"image_id": 3, "category_id": 2}]}, r"annotations\[0\] has no `bbox`"),
        ({"annotations": []}, "has no image with an object"),
        ({"annotations": [3]}, r"annotations\[0\] is not what it must be"),
        ({"annotations": [{"image_id": 3, "category_id": 2, "bbox": [0, "x", 1, 1]}]}, "could not convert"),
        ({"annotations": [{"image_id": "3", "category_id": 2, "bbox": [0, 0, 1, 1]}]}, "names image '3'"),
        ({"images": [{"id": 3, "file_name": "3.png", "width": 10}]}, r"images\[0\] has no `height`"),
        ({"categories": [{"id": 2, "name": "a"}, {"id": 7}]}, r"categories\[1\] has no `name`"),
    ],
)
def test_malformed_files_are_named(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = write(tmp_path, **changes)
    with pytest.raises(InputError, match=words) as error:
        read_coco(tmp_path, path, training=True)
    assert str(path) in str(error.value)


def test_a_path_is_wrong_input_and_a_disk_that_fails_is_not(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for wrong in (tmp_path / "none", tmp_path, tmp_path / "file/in"):
        with pytest.raises(InputError, match="cannot be read"):
            read_coco(tmp_path, wrong, training=True)
    (tmp_path / "mem").symlink_to("/proc/self/mem")  # its first read is an EIO
    with pytest.raises(OSError, match="Input/output error"):
        read_coco(tmp_path, tmp_path / "mem", training=True)


@pytest.mark.parametrize("grouped", [True, False])
def test_every_epoch_is_seen_whole(grouped: bool) -> None:
    wide = np.arange(50) % 3 == 0
    order = Order(50, 8, seed=1, wide=wide if grouped else None)
    samples = [sample for step in range(2 * WINDOW) for sample in order.step(step)]
    whole = len(samples) // 50
    for epoch in range(whole):
        assert sorted(index for e, index in samples if e == epoch) == list(range(50))
    assert Order(50, 8, seed=1).step(0) != Order(50, 8, seed=2).step(0)


def test_grouping_leaves_one_mixed_batch_in_a_window() -> None:
    wide = np.random.default_rng(0).random(200) < 0.7
    order = Order(200, 16, seed=0, wide=wide)
    for window in range(3):
        batches_ = [order.step(window * WINDOW + step) for step in range(WINDOW)]
        mixed = sum(len({bool(wide[index]) for _, index in batch}) > 1 for batch in batches_)
        assert mixed <= 1
    kinds = [bool(wide[order.step(step)[0][1]]) for step in range(WINDOW)]
    assert kinds != sorted(kinds), "wide and tall batches take turns"


def test_a_step_has_the_same_images_on_any_number_of_ranks() -> None:
    def of_step(step: int, ranks: int, parts: int) -> list[tuple[int, int]]:
        order = Order(40, 16, seed=4, wide=np.arange(40) < 25)
        return [
            sample
            for rank in range(ranks)
            for part in training_steps(order, step, step + 1, rank, ranks, parts)
            for sample in part
        ]

    for step in (0, 5, WINDOW + 3):
        assert of_step(step, 1, 1) == of_step(step, 2, 1) == of_step(step, 4, 2) == of_step(step, 8, 2)


def load(coco: Coco, workers: int, start: int, stop: int) -> list[Batch]:
    order = Order(len(coco), 8, seed=2, wide=coco.sizes[:, 0] > coco.sizes[:, 1])
    samples = training_steps(order, start, stop, 0, 2, 1)
    return list(batches(TrainingSet(coco, AUGMENT, seed=2), samples, workers, pin=False))


def test_batches_do_not_depend_on_workers_nor_on_where_one_starts(shapes: Path) -> None:
    coco = read(shapes)
    alone, helped, resumed = load(coco, 0, 0, 9), load(coco, 2, 0, 9), load(coco, 1, 5, 9)
    assert len(alone) == len(helped) == 9 and len(resumed) == 4
    for a, b in [*zip(alone, helped, strict=True), *zip(alone[5:], resumed, strict=True)]:
        assert all(
            torch.equal(x, y)
            for x, y in zip((*a.targets, *a[:2], a.index), (*b.targets, *b[:2], b.index), strict=True)
        )
    first, second = (batch for batch in alone if batch.index.tolist() != alone[0].index.tolist()), alone[0]
    assert not all(torch.equal(batch.images, second.images) for batch in first)


def test_batches_are_padded(shapes: Path) -> None:
    batch = load(read(shapes), 0, 0, 1)[0]
    n, channels, height, width = batch.images.shape
    assert (n, channels) == (4, 3) and height % 32 == width % 32 == 0 and batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    for image, (h, w), boxes, labels in zip(batch.images, batch.sizes.tolist(), *batch.targets, strict=True):
        assert not image[:, h:].any() and not image[:, :, w:].any() and image[:, :h, :w].any()
        real = boxes[labels >= 0]
        assert (real[:, 2:] > real[:, :2]).all() and (real[:, 2] <= w).all() and (real[:, 3] <= h).all()
        assert not boxes[labels < 0].any()


def test_an_image_that_cannot_be_read_is_named(shapes: Path, tmp_path: Path) -> None:
    coco = read(shapes, "val", training=False)
    for name in coco.files:
        (tmp_path / name).write_bytes((coco.folder / name).read_bytes())
    victim = tmp_path / coco.files[3]
    victim.write_bytes(victim.read_bytes()[:300])
    moved = read_coco(tmp_path, coco.annotations, training=False)
    for workers in (0, 1):
        with pytest.raises(InputError) as error:
            list(
                batches(EvaluationSet(moved, Resize(short=64, max=64)), [[0, 1], [2, 3]], workers, pin=False)
            )
        assert str(victim) in str(error.value) and "Traceback" not in str(error.value)


def test_loader_processes_outlive_signals(shapes: Path) -> None:
    """A SIGTERM to the whole group is the rank's to handle; its loaders go on. They leave with the rank."""
    coco = read(shapes, "val", training=False)
    plan = [[index] for index in range(12)]
    before = set(children())
    loader = batches(EvaluationSet(coco, Resize(short=64, max=64)), plan, 1, pin=False)
    (helper,) = set(children()) - before
    for number in ("TERM", "INT", "USR1", "USR2"):
        subprocess.run(["kill", f"-{number}", str(helper)], check=True)
    assert len(list(loader)) == 12

    loader = batches(EvaluationSet(coco, Resize(short=64, max=64)), plan, 1, pin=False)
    (helper,) = set(children()) - before
    os.kill(helper, signal.SIGTERM)  # as multiprocessing does when a rank leaves with its loader at work
    psutil.Process(helper).wait(timeout=60)


def children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
