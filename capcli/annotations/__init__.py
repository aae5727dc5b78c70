"""Images with captions, read from all common formats.

split = read_split(DataOptions(data=("captions.txt",), val_fraction=0.1))
train = check_images(split.train, split.report)
print(split.report.line())
"""

from capcli.annotations.data_report import DataReport
from capcli.annotations.dataset_reading import check_images, read_annotations, read_split
from capcli.annotations.splits import Split

__all__ = ["DataReport", "Split", "check_images", "read_annotations", "read_split"]
