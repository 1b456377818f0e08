"""What the documentation says, as data."""

import re

from support.paths import ROOT

#: What `docs/bases.md` says of each base: size, preprocessing in words, feature length.
BASES_TABLE = {
    name: (int(size), words, int(length))
    for name, size, words, length in re.findall(
        r"^\| (\w+) \| (\d+) \| (.+?) \| (\d+) \|$", (ROOT / "docs" / "bases.md").read_text(), flags=re.MULTILINE
    )
}
PREPROCESSING = {
    "tf": "-1 to 1",
    "torch": "ImageNet mean and deviation",
    "caffe": "BGR minus ImageNet mean",
    "inside": "by the network",
}
