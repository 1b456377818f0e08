"""Where things are."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"
GOLDEN = ROOT / "tests" / "golden"
PHOTOS = ROOT.parent / "shared" / "photos"
TLBATCH = str(Path(sys.executable).parent / "tlbatch")
