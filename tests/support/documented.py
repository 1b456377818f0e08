"""What the documentation says, as data."""

import re

from support.paths import ROOT

#: What `docs/bases.md` says of each base: size, preprocessing in words, lengths of the features of the last layer and depths.
BASES_TABLE = {
    name: (int(size), words, int(last), int(depths))
    for name, size, words, last, depths in re.findall(
        r"^\| (\w+) \| (\d+) \| (.+?) \| (\d+) \| (\d+) \|$",
        (ROOT / "docs" / "bases.md").read_text(),
        flags=re.MULTILINE,
    )
}
PREPROCESSING = {
    "tf": "-1 to 1",
    "torch": "ImageNet mean and deviation",
    "caffe": "BGR minus ImageNet mean",
    "inside": "by the network",
}
