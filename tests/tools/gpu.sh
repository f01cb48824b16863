#!/usr/bin/env bash
# What a CUDA GPU shows, in some ten minutes: whether it computes what the CPU computes, and how fast
# it is. On a machine without one, the tests are skipped, and the figures are a trial of tiny sizes.
set -euo pipefail
cd "$(dirname "$0")/../.."
python -m pytest -q tests/test_gpu.py tests/test_char_gpt.py tests/test_bpe_gpt.py \
    tests/test_training.py tests/test_weights.py || echo "SOME TESTS FAILED"
python tests/tools/bench.py --only gpu
