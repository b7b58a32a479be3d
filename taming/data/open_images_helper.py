"""Which classes of Open Images the scene models use, and under which name."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from taming.util import atomic_path

# finer class → the class that COCO has, by Open Images' identifiers
open_images_unify_categories_for_coco = {
    "/m/03bt1vf": "/m/01g317",  # woman → person
    "/m/04yx4": "/m/01g317",  # man → person
    "/m/05r655": "/m/01g317",  # girl → person
    "/m/01bl7v": "/m/01g317",  # boy → person
    "/m/0cnyhnx": "/m/01xq0k1",  # bull → cattle
    "/m/01226z": "/m/018xm",  # football → ball
    "/m/05ctyq": "/m/018xm",  # tennis ball → ball
    "/m/058qzx": "/m/04ctx",  # kitchen knife → knife
    "/m/06pcq": "/m/0l515",  # submarine sandwich → sandwich
    "/m/03m3pdh": "/m/02crq1",  # sofa bed → couch
    "/m/046dlr": "/m/01x3z",  # alarm clock → clock
    "/m/0h8mzrc": "/m/01x3z",  # wall clock → clock
}

# things of COCO by Open Images' names; those frequent enough are among the first 300 anyway
COCO_THINGS = (
    "Person", "Bicycle", "Car", "Motorcycle", "Airplane", "Bus", "Train", "Truck", "Boat", "Traffic light",
    "Fire hydrant", "Stop sign", "Parking meter", "Bench", "Bird", "Cat", "Dog", "Horse", "Sheep", "Cattle",
    "Elephant", "Bear", "Zebra", "Giraffe", "Backpack", "Umbrella", "Handbag", "Tie", "Suitcase", "Flying disc",
    "Ski", "Snowboard", "Ball", "Kite", "Baseball bat", "Baseball glove", "Skateboard", "Surfboard", "Tennis racket",
    "Bottle", "Wine glass", "Coffee cup", "Fork", "Knife", "Spoon", "Bowl", "Banana", "Apple", "Sandwich", "Orange",
    "Broccoli", "Carrot", "Hot dog", "Pizza", "Doughnut", "Cake", "Chair", "Couch", "Houseplant", "Bed",
    "Kitchen & dining room table", "Toilet", "Television", "Laptop", "Computer mouse", "Remote control",
    "Computer keyboard", "Mobile phone", "Microwave oven", "Oven", "Toaster", "Sink", "Refrigerator", "Book", "Clock",
    "Vase", "Scissors", "Teddy bear", "Hair dryer", "Toothbrush",
)  # fmt: skip
MOST_FREQUENT = 300


def read_class_names(class_descriptions: str | Path) -> dict[str, str]:
    """Identifier → name, from `class-descriptions-boxable.csv`."""
    with open(class_descriptions, newline="", encoding="utf-8") as file:
        return {row[0]: row[1] for row in csv.reader(file) if len(row) >= 2}


def count_boxes(annotations: str | Path) -> Counter[str]:
    """Identifier → number of boxes, from a file of box annotations."""
    with open(annotations, newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        return Counter(
            row["LabelName"] for row in tqdm(rows, desc="counting boxes", unit="box", unit_scale=True)
        )


def top_300_classes_plus_coco_compatibility(
    class_descriptions: str | Path, train_annotations: str | Path, cache: str | Path
) -> list[tuple[str, int]]:
    """The 300 classes with most boxes and those that COCO has, as (name, number of boxes), most frequent first.

    Counted once, then kept in `cache`. That file holds `[[name, number], …]` as JSON; a published list put there
    instead is used as it is, which a published checkpoint needs: class numbers follow from the list.

    Args:
        class_descriptions: `class-descriptions-boxable.csv` of Open Images.
        train_annotations: its box annotations of the training split; also for other splits, so that all agree.
        cache: where the list is kept.

    Raises:
        FileNotFoundError: neither the cache nor the two files exist.
    """
    cache = Path(cache)
    if cache.is_file():
        return [(str(name), int(number)) for name, number in json.loads(cache.read_text(encoding="utf-8"))]
    for needed in (class_descriptions, train_annotations):
        if not Path(needed).is_file():
            raise FileNotFoundError(
                f"there is no {needed}, which the list of the most frequent classes is counted from; fetch it from "
                f"storage.googleapis.com/openimages, or put a list [[name, number], …] at {cache}"
            )
    names = read_class_names(class_descriptions)
    counts = count_boxes(train_annotations)
    ranked = sorted(names, key=lambda key: (-counts[key], names[key]))
    wanted = {name.casefold() for name in COCO_THINGS}
    chosen = [
        (names[key], counts[key])
        for rank, key in enumerate(ranked)
        if rank < MOST_FREQUENT or names[key].casefold() in wanted
    ]
    with atomic_path(cache) as temporary:
        temporary.write_text(json.dumps(chosen, ensure_ascii=False), encoding="utf-8")
    return chosen
