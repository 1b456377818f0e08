"""Classify what a store has gained since last night; what did not change is not read.

ray job submit --working-dir . -- python jobs/nightly.py --config jobs/nightly.yaml
"""

import sys

from tlbatch.cli import main

sys.argv[1:1] = ["classify", "--incremental"]
main()
