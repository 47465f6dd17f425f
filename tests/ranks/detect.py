"""One rank of the multi-process test of detection: runs the job in a file, leaves its detector in another."""

import pickle
import sys
from pathlib import Path

import torch

import tools.detect

job, detector = map(Path, sys.argv[1:])
evaluate = tools.detect.evaluate


def save_and_evaluate(protocol, finetuning, *rest):
    torch.save(finetuning.detector.state_dict(), detector)
    return evaluate(protocol, finetuning, *rest)


tools.detect.evaluate = save_and_evaluate
tools.detect.run_detection(pickle.loads(job.read_bytes()))
