"""Classify the images that are new or changed since the last run; unchanged images are not read.

ray job submit --working-dir . -- python jobs/nightly.py --config jobs/nightly.yaml
"""

import sys

from tlbatch.cli import main

sys.argv[1:1] = ["classify", "--incremental"]
main()
