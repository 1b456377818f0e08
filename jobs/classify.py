"""Classify a whole store on a cluster. Run the same command again to continue, or after new images have arrived.

ray job submit --working-dir . -- python jobs/classify.py --images s3://bucket/images \
        --bundle s3://bucket/bundles/defects --output s3://bucket/predictions
"""

import sys

from tlbatch.cli import main

sys.argv.insert(1, "classify")
main()
