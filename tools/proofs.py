"""Say whether the full proof of every lab has passed for the sources as they are; exit code 1 where one has not."""

import sys
from pathlib import Path

from llmlab.authoring.lab import find_labs
from llmlab.authoring.proof import stored_proof

labs = find_labs(Path(__file__).resolve().parent.parent / "labs")
missing = [lab.name for lab in labs if stored_proof(lab) is None]
print(f"to be proved in full: {', '.join(missing)}" if missing else "every lab is proved in full for these sources")
sys.exit(bool(missing))
