"""Write the features of a whole store on a cluster.

ray job submit --working-dir . -- python jobs/extract.py --images s3://bucket/images \
        --bundle s3://bucket/bundles/defects --output s3://bucket/features
"""

import sys

from tlbatch.cli import main

sys.argv.insert(1, "extract")
main()
