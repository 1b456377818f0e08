"""Train a head on a cluster.

ray job submit --working-dir . -- python jobs/train.py --images s3://bucket/labelled --labels s3://bucket/labels.csv \
        --base MobileNetV2 --weights s3://bucket/mobilenetv2_notop.h5 --bundle s3://bucket/bundles/defects
"""

import sys

from tlbatch.cli import main

sys.argv.insert(1, "train")
main()
