"""One rank of the multi-process test of detection: `run_detection` of the job in the given file."""

import pickle
import sys
from pathlib import Path

from tools.detect import run_detection

run_detection(pickle.loads(Path(sys.argv[1]).read_bytes()))
