#!/bin/sh
# Makes the demo model from nothing, in build/: text -> tokenizer -> training -> score. Needs Python 3.11 or newer.
#   ./reproduce.sh            as many tokens as the shipped weights have seen
#   ./reproduce.sh 1          another number of millions of tokens (1 is enough to see it run)
# An interrupted run goes on where it stopped. To ship the result:
#   cp build/*.json build/chat_template.jinja build/model.safetensors weights/ && mv weights/score.json .
set -eu
cd "$(dirname "$0")"
million=${1:-19}

[ -d build/venv ] || python3 -m venv build/venv
python=build/venv/bin/python
$python -m pip install --quiet -r requirements.txt

[ -f build/tokenizer.json ] || $python tokenizer.py --out build
$python train.py --out build --million "$million"
$python evaluate.py --model build --score build/score.json
$python evaluate.py --model build --check
