"""Predict from stored features with another head, on a cluster, without reading images.

ray job submit --working-dir . -- python jobs/rescore.py --features s3://bucket/features \
        --bundle s3://bucket/bundles/defects-2 --output s3://bucket/predictions
"""

import sys

from tlbatch.cli import main

sys.argv.insert(1, "rescore")
main()
